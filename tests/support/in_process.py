"""A cluster inside the test's process: the real orchestrator and workers, real sockets, one event loop in a thread.

Starts in a fraction of the time of a cluster of processes, and lets a test look into the workers, hold them up
between steps and read what they said.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.config.worker import WorkerConfig
from anabranch.engine.pending import PendingResult
from anabranch.protocol.workers import Ended, Generate, Message, Prefill, PrefillEnded, Reserve, ToOrchestrator
from anabranch.step.plan import StepPlan
from anabranch_client import CallCancelled, Client, Unavailable
from attn_nodes.rank import AttnRank
from attn_nodes.worker import AttnWorker
from decode.worker import DecodeWorker
from ffn_nodes.worker import FfnWorker
from orchestrator.resolved_model import CheckpointModel
from orchestrator.service import Orchestrator
from prefill.worker import PrefillWorker
from runtime.worker import Worker
from tests.support.resources import our_threads
from tests.support.thread_encoder import ThreadEncoder
from tests.support.waiting import WAIT_S

T = TypeVar("T")


def wait_until(
    condition: Callable[[], bool],
    what: str,
    timeout_s: float = WAIT_S,
    describe: Callable[[], object] = lambda: "",
) -> None:
    """Poll until `condition` holds; fails with `what` (and what `describe` says) where it does not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not in {timeout_s} s: {what} {describe()}"
        time.sleep(0.005)


class Throttle:
    """Lets a worker's first rank compute one step for each permit; the steps' plans are kept.

    The engine's thread goes on: it may have scheduled a step behind the one that waits.
    """

    def __init__(self, worker: Worker) -> None:
        self.plans: list[StepPlan] = []
        self._rank = worker.ranks._local  # type: ignore[attr-defined]
        self._step: Callable[[StepPlan], PendingResult] = self._rank.step
        self._permits = threading.Semaphore(0)
        self._open = False
        self._num_begun = 0
        self._rank.step = self._run

    @property
    def waiting(self) -> bool:
        """Whether a step has begun that has no permit yet."""
        return self._num_begun > len(self.plans)

    def allow(self, num_steps: int) -> None:
        """Let so many steps go on, and wait until they are done and the next one waits."""
        wait_until(lambda: self.waiting, "a step to begin")
        wanted = len(self.plans) + num_steps
        for _ in range(num_steps):
            self._permits.release()
        wait_until(lambda: len(self.plans) == wanted and self.waiting, f"{num_steps} steps")

    def open(self) -> None:
        """Hold nothing up any more."""
        self._open = True
        self._rank.step = self._step
        self._permits.release()

    def _run(self, plan: StepPlan) -> PendingResult:
        self._num_begun += 1
        assert self._permits.acquire(timeout=WAIT_S) or self._open
        result = self._step(plan)
        self.plans.append(plan)
        return result


def _calls_out(rank: AttnRank) -> list[str]:
    """What an attention rank still waits for, in words."""
    ffn = rank._ffn
    left = [f"{len(node.calls)} calls at {node.name}" for node in ffn._nodes.values() if node.calls]
    return left + ["lanes are busy"] * rank.busy + [f"{len(ffn._unsent)} parts wait"] * bool(ffn._unsent)


class Minutes:
    """What a worker was given and what it said of it, for counting."""

    def __init__(self, worker: Worker) -> None:
        self.given: Counter[tuple[str, str, int]] = Counter()
        self.ended: Counter[tuple[str, str, int]] = Counter()
        self._handle = worker.handle
        self._post = worker.post
        worker.handle = self._handled  # type: ignore[method-assign]
        worker.post = self._posted  # type: ignore[method-assign]

    def check(self) -> None:
        """Assert that everything given has ended exactly once."""
        assert self.given == self.ended
        assert not self.given or max(self.given.values()) == 1

    def _handled(self, message: Message) -> None:
        if isinstance(message, Reserve | Generate | Prefill):
            kind = "prefill" if isinstance(message, Prefill) else "decode"
            self.given[kind, message.request.request_id, message.request.epoch] += 1
        self._handle(message)

    def _posted(self, message: ToOrchestrator) -> None:
        if isinstance(message, Ended | PrefillEnded):
            kind = "prefill" if isinstance(message, PrefillEnded) else "decode"
            self.ended[kind, message.request_id, message.epoch] += 1
        self._post(message)


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
        self._orchestrator_config = OrchestratorConfig(
            **{
                "model": str(model),
                "grpc_bind": "127.0.0.1:0",
                "control_bind": f"ipc://{folder}/control",
                "ffn_workers": roles.count("ffn"),
                **(orchestrator or {}),
            }
        )
        defaults: dict[str, object] = {
            "model": str(model),
            "dtype": "float32",
            "threads": 1,
            "kv_cache_bytes": 16 << 20,
            "offload_bytes": 1 << 20,
            "block_size": 16,
            "native_kernels": False,
        }
        self._options = [
            {
                "role": role,
                "name": f"{role}-{index}",
                **defaults,
                **options,
                **(by_role or {}).get(role, {}),
            }
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
        self._threads_before = our_threads()
        self._thread.start()
        try:
            assert self._ready.wait(WAIT_S), "the event loop did not start"
            if self._error is None:
                with Client(self.endpoint) as client:
                    wait_until(
                        lambda: self._error is not None or self._complete(client),
                        "all workers to come",
                        WAIT_S,
                    )
            if self._error is not None:
                raise self._error
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        if kind is None and self._error is not None:
            raise self._error

    @property
    def orchestrator(self) -> Orchestrator:
        return self._orchestrator

    def names(self) -> dict[str, str]:
        """What clients call the requests in flight, by the orchestrator's own ids."""
        requests = self._orchestrator._dispatcher._requests
        return self.call(lambda: {request_id: lifecycle.client_id for request_id, lifecycle in requests.items()})

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` in the cluster's event loop and give what it returns or raises."""

        async def run() -> T:
            return function()

        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(WAIT_S)

    def wait_idle(self) -> None:
        """Wait until nothing is left of any request anywhere, then check the books."""
        wait_until(lambda: not self._left(), "idle; left", describe=self._left)
        for worker in self.workers:
            if worker.config.role == "ffn":
                continue
            worker.engine.cache.check_integrity()  # type: ignore[attr-defined]
            if worker.config.role != "prefill" and worker.scheduler.offload is not None:  # type: ignore[attr-defined]
                worker.scheduler.offload.check_integrity()  # type: ignore[attr-defined]
            minutes = self.minutes[worker.config.name]
            wait_until(lambda minutes=minutes: minutes.given == minutes.ended, "an end for everything given")
            minutes.check()

    def _left(self) -> list[str]:
        """What is left of requests, in words."""
        left = []
        try:
            self.call(self._orchestrator.check_integrity)
        except AssertionError as error:
            left.append(f"orchestrator: {error}")
        for worker in self.workers:
            stats = worker.stats()
            if worker.config.role == "ffn":
                # It is never idle while attention workers are linked to it.
                if stats.num_running or stats.num_waiting:
                    left.append(f"{worker.config.name}: {stats}")
                continue
            rank = worker.ranks._local  # type: ignore[attr-defined]
            if worker.config.role == "prefill":
                streams, staging = rank._senders | dict.fromkeys(rank._opening), rank._source.staging_bytes
            else:
                streams, staging = rank._receiver._streams, rank._receiver.staging_bytes
            if worker.config.role == "attn":
                left += [f"{worker.config.name}: {calls}" for calls in _calls_out(rank)]
            held = stats.num_total_blocks - stats.num_free_blocks
            held += stats.num_total_host_blocks - stats.num_free_host_blocks
            if not worker.is_idle() or held or streams or staging:
                left.append(f"{worker.config.name}: {stats}, streams {list(streams)}, staging {staging}")
        return left

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Keep a worker's engine between two steps; its event loop and tensor planes go on."""
        reached, go_on = threading.Event(), threading.Event()

        def wait() -> None:
            reached.set()
            assert go_on.wait(WAIT_S)

        self.worker(name).submit(wait)
        assert reached.wait(WAIT_S)
        try:
            yield
        finally:
            go_on.set()

    @contextmanager
    def throttled(self, name: str) -> Iterator[Throttle]:
        """Let a worker compute only the steps that are allowed."""
        throttle = Throttle(self.worker(name))
        try:
            yield throttle
        finally:
            throttle.open()

    def worker(self, name: str) -> Worker:
        return next(worker for worker in self.workers if worker.config.name == name)

    def _end(self) -> None:
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "the cluster did not stop"
        wait_until(lambda: our_threads() == self._threads_before, "all threads to end", describe=our_threads)

    def _complete(self, client: Client) -> bool:
        try:
            pools = client.model().pools
        except (Unavailable, CallCancelled):  # a worker has failed and the orchestrator ends
            return False
        return sum(pool.num_workers for pool in pools) == len(self._options) and client.health() == "serving"

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
        model = CheckpointModel(self._orchestrator_config.model)
        self._orchestrator = Orchestrator(self._orchestrator_config, model, ThreadEncoder.of(model.tokenizer))
        await self._orchestrator.start()
        self.endpoint = self._orchestrator.grpc_endpoint
        rooms = {
            "prefill": PrefillWorker,
            "decode": DecodeWorker,
            "colocated": DecodeWorker,
            "attn": AttnWorker,
            "ffn": FfnWorker,
        }
        configs = [
            WorkerConfig(orchestrator=self._orchestrator.control_endpoint, **options) for options in self._options
        ]
        self.workers = [rooms[config.role](config) for config in configs]
        self.minutes = {worker.config.name: Minutes(worker) for worker in self.workers}
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
