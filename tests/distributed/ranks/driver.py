"""`python -m tests.distributed.ranks.driver MODEL`: starts three ranks, prints the others' pids, and waits."""

from __future__ import annotations

import sys
import threading

from anabranch.config.worker import WorkerConfig
from runtime.ranks import Ranks
from tests.distributed.ranks.room import ROOM, Command, Event

if __name__ == "__main__":
    config = WorkerConfig(
        role="decode",
        name="talk-0",
        orchestrator="",
        model=sys.argv[1],
        dtype="float32",
        threads=1,
        kv_cache_bytes=1 << 20,
        native_kernels=False,
        tp=3,
    )
    ranks = Ranks[Command, Event](
        config,
        ROOM,
        heard=lambda rank, event: None,
        on_failure=lambda error: None,
    )
    ranks.start()
    print(*ranks._group.pids.values(), flush=True)
    threading.Event().wait()
