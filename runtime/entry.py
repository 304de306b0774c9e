"""How a worker process starts and ends: flags -> pin -> run -> exit status."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

import uvloop

from anabranch.config.flags import parse_flags
from anabranch.config.worker import WorkerConfig
from anabranch.engine.device import pin_process
from anabranch.engine.fit import rank_config
from anabranch.errors import AnabranchError
from anabranch.protocol.workers import Role
from anabranch.system.logs import configure_logging
from anabranch.system.standard_streams import standard_streams
from runtime.start import fork_from_here
from runtime.worker import Worker

logger = logging.getLogger(__name__)


async def serve(workers: Sequence[Worker]) -> None:
    """Run workers in this event loop until all have ended; SIGTERM and SIGINT drain, a second one ends at once.

    The first worker that fails ends the others.
    """
    loop = asyncio.get_running_loop()
    tasks = [asyncio.create_task(worker.run(), name=worker.config.name) for worker in workers]
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        for worker, task in zip(workers, tasks, strict=True):
            if signals == 1:
                worker.drain()
            else:
                task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run_workers(workers: Sequence[Callable[[], Worker]]) -> int:
    """Build the workers inside the event loop and serve; returns the exit status."""

    async def main() -> None:
        await serve([build() for build in workers])

    try:
        uvloop.run(main())
    except AnabranchError as error:
        logger.error("%s", error)
        return 1
    except (asyncio.CancelledError, KeyboardInterrupt):
        return 130
    return 0


def worker_main(role: Role, about: str, build: Callable[[WorkerConfig], Worker]) -> None:
    """The body of `python -m <room>`: parse -> build -> announce ready -> run -> drain -> exit."""
    with standard_streams():
        config = parse_flags(WorkerConfig, sys.argv[1:], prog=f"python -m {role}", about=about, defaults={"role": role})
        configure_logging(config.name)
        if config.rank_processes and config.num_ranks > 1:
            # Now, while there is one thread and nothing is loaded: its ranks are there at once.
            fork_from_here()
        try:
            own = rank_config(config, 0)
            pin_process(own.cores, own.threads)
        except AnabranchError as error:
            logger.error("%s", error)
            raise SystemExit(2) from None
        code = run_workers([lambda: build(config)])
        if code == 1:
            # Not the interpreter's own end, which would wait for threads that may hang.
            sys.stderr.flush()
            os._exit(code)
        raise SystemExit(code)
