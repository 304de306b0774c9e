"""A cluster inside the test's process: the real orchestrator and workers, real sockets, one event loop in a thread.

Starts in a fraction of the time of a cluster of processes, and lets a test look into the workers.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.config.worker import WorkerConfig
from anabranch_client import Client
from decode.worker import DecodeWorker
from orchestrator.resolved_model import CheckpointModel
from orchestrator.service import Orchestrator
from prefill.worker import PrefillWorker
from runtime.worker import Worker

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
IDLE_TIMEOUT_S = 20.0


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = IDLE_TIMEOUT_S) -> None:
    """Poll until `condition` holds; fails with `what` where it does not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not in {timeout_s} s: {what}"
        time.sleep(0.01)


class InProcessCluster:
    """Orchestrator and workers in one event loop.

    Args:
        folder: private, for the control channel's socket.
        roles: one worker for each.
        options: of every worker, over the tests' small defaults; `by_role` goes before it.
    """

    def __init__(
        self,
        folder: Path,
        model: Path | str,
        roles: Sequence[str],
        *,
        orchestrator: dict[str, object] | None = None,
        by_role: dict[str, dict[str, object]] | None = None,
        **options: object,
    ) -> None:
        control = f"ipc://{folder}/control"
        defaults: dict[str, object] = {
            "dtype": "float32",
            "threads": 1,
            "kv_cache_bytes": 16 << 20,
            "block_size": 16,
            "native_kernels": False,
        }
        self._orchestrator_config = OrchestratorConfig(
            model=str(model), grpc_bind="127.0.0.1:0", control_bind=control, **(orchestrator or {})
        )
        self.configs = [
            WorkerConfig(
                role=role,
                name=f"{role}-{index}",
                model=str(model),
                orchestrator=control,
                **{**defaults, **options, **(by_role or {}).get(role, {})},
            )
            for index, role in enumerate(roles)
        ]
        self.workers: list[Worker] = []
        self.endpoint = ""
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cluster", daemon=True)

    def __enter__(self) -> InProcessCluster:
        self._thread.start()
        assert self._ready.wait(START_TIMEOUT_S), "the event loop did not start"
        if self._error is not None:
            raise self._error
        with Client(self.endpoint) as client:
            wait_until(
                lambda: self._error is not None or self._complete(client), "all workers registered", START_TIMEOUT_S
            )
        if self._error is not None:
            raise self._error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop is not None and self._stop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(STOP_TIMEOUT_S)
        assert not self._thread.is_alive(), "the cluster did not stop"
        if kind is None and self._error is not None:
            raise self._error

    @property
    def orchestrator(self) -> Orchestrator:
        return self._orchestrator

    def wait_idle(self) -> None:
        """Wait until every worker has all its blocks and no request, then check the books."""

        def idle() -> bool:
            return self._orchestrator.num_requests == 0 and all(
                worker.is_idle() and worker.stats().num_free_blocks == worker.stats().num_total_blocks
                for worker in self.workers
            )

        wait_until(idle, "all blocks free")
        for worker in self.workers:
            worker.engine.cache.check_integrity()  # type: ignore[attr-defined]

    def worker(self, name: str) -> Worker:
        return next(worker for worker in self.workers if worker.config.name == name)

    def _complete(self, client: Client) -> bool:
        pools = client.model().pools
        return sum(pool.num_workers for pool in pools) == len(self.configs) and client.health() == "serving"

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._orchestrator = Orchestrator(self._orchestrator_config, CheckpointModel(self._orchestrator_config.model))
        await self._orchestrator.start()
        self.endpoint = self._orchestrator.grpc_endpoint
        rooms = {"prefill": PrefillWorker, "decode": DecodeWorker, "colocated": DecodeWorker}
        self.workers = [rooms[config.role](config) for config in self.configs]
        tasks = [asyncio.create_task(worker.run()) for worker in self.workers]
        self._ready.set()
        stop = asyncio.create_task(self._stop.wait())
        try:
            done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stop}:
                task.result()
        finally:
            for task in (stop, *tasks):
                task.cancel()
            await asyncio.gather(stop, *tasks, return_exceptions=True)
            await self._orchestrator.close()
