"""`python -m launch.inproc --workers JSON`: prefill, decode and attn workers in one process, over the in-process plane.

Each worker registers and is routed to as if it had a process of its own; only the tensor plane differs.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from functools import partial

import msgspec

from anabranch.config.worker import WorkerConfig
from anabranch.engine.device import pin_process
from anabranch.errors import AnabranchError
from anabranch.system.logs import configure_logging
from launch.process_plan import INPROC_NAME
from runtime.entry import run_workers
from runtime.worker import Worker

logger = logging.getLogger(__name__)


def build_worker(config: WorkerConfig) -> Worker:
    """The worker that `config.role` names."""
    if config.role == "prefill":
        from prefill.worker import PrefillWorker

        return PrefillWorker(config)
    if config.role == "attn":
        from attn_nodes.worker import AttnWorker

        return AttnWorker(config)
    from decode.worker import DecodeWorker

    return DecodeWorker(config)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the workers' configurations, pin the process to all their cores, and serve."""
    parser = argparse.ArgumentParser(prog="python -m launch.inproc", description=__doc__)
    parser.add_argument("--workers", required=True, help="JSON list of worker configurations")
    arguments = parser.parse_args(argv)
    configure_logging(INPROC_NAME)
    try:
        configs = msgspec.json.decode(arguments.workers, type=tuple[WorkerConfig, ...])
        if not configs:
            raise msgspec.ValidationError("--workers: give at least one worker")
        cores = tuple(sorted({core for config in configs for core in config.cores}))
        pin_process(cores, max(config.threads for config in configs))
    except (AnabranchError, msgspec.ValidationError) as error:
        logger.error("%s", error)
        raise SystemExit(2) from None
    # transformers fills in its names at first use, and not safely in two threads at once, as the builds would.
    from transformers import AutoConfig  # noqa: F401

    raise SystemExit(run_workers([partial(build_worker, config) for config in configs]))


if __name__ == "__main__":
    main()
