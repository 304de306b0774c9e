"""`python -m orchestrator`: serve clients over gRPC and lead the workers that register."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

import uvloop

from anabranch.config.flags import parse_flags
from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import AnabranchError
from anabranch.system.logs import configure_logging
from anabranch.system.standard_streams import standard_streams
from orchestrator.connections import raise_descriptor_limit
from orchestrator.encoding.pool import fork_encoders
from orchestrator.resolved_model import CheckpointModel
from orchestrator.served_model import PromptEncoder, ServedModel
from orchestrator.service import Orchestrator

logger = logging.getLogger(__name__)

ABOUT = """Serve clients over gRPC and lead the workers that register.

Prints where it listens, and writes it to --endpoints-file for programs. Start workers with
`python -m prefill`, `python -m decode` and --orchestrator set to the control address; requests are served once
a prefill and a decode worker, or a colocated one, have registered. In place of decode workers, `python -m attn_nodes`
with `python -m ffn_nodes` serve once these hold every expert (--ffn-workers, --ffn-replicas). Workers on other
machines need --control-bind tcp://HOST:PORT here, and the same --secret-file everywhere.

SIGTERM or Ctrl-C takes no new requests, finishes those in flight (--drain-timeout-s), tells workers to exit and
ends with status 0; a second signal ends at once.
"""


async def serve(config: OrchestratorConfig, model: ServedModel, encoder: PromptEncoder) -> int:
    """Serve until a signal, then drain. Returns the exit status."""
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    orchestrator = Orchestrator(config, model, encoder)
    await orchestrator.start()
    failed = asyncio.create_task(orchestrator.failed.wait())
    signalled = asyncio.create_task(signals.get())
    await asyncio.wait((failed, signalled), return_when=asyncio.FIRST_COMPLETED)
    if not failed.done():
        logger.info("draining: %d requests in flight", orchestrator.num_requests)
        again = asyncio.create_task(signals.get())
        drained = asyncio.create_task(orchestrator.drain())
        await asyncio.wait((drained, again, failed), return_when=asyncio.FIRST_COMPLETED)
        for task in (drained, again):
            task.cancel()
    status = 1 if failed.done() else 0
    failed.cancel()
    signalled.cancel()
    await orchestrator.close()
    return status


def main() -> None:
    """Parse -> load -> fork what encodes prompts -> announce ready -> run -> drain -> exit."""
    config = parse_flags(OrchestratorConfig, sys.argv[1:], prog="python -m orchestrator", about=ABOUT)
    configure_logging("orchestrator")
    raise_descriptor_limit()
    for number in (signal.SIGTERM, signal.SIGINT):  # until the event loop takes them: nothing is to be drained yet
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        model = CheckpointModel(config.model)
        # Before the event loop and gRPC start threads, which a fork would not take along.
        encoder = fork_encoders(config, model.tokenizer)
        status = uvloop.run(serve(config, model, encoder))
    except AnabranchError as error:
        logger.error("%s", error)
        status = 2 if isinstance(error, ValueError) else 1
    raise SystemExit(status)


if __name__ == "__main__":
    with standard_streams():
        main()
