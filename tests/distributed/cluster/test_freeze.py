"""Processes that are stopped in the middle of an answer and go on: the answer goes on too, with the same tokens.

What is stopped alone for longer than others wait for it still counts as dead: see `test_process_death`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from anabranch.config.topology import PoolConfig, Pools, Topology
from anabranch.config.worker import WorkerConfig
from anabranch_client import Admin, Client, Finished, Sampling, Tokens
from launch import process_plan
from launch.cluster import LocalCluster
from tests.support.in_process import wait_until
from tests.support.known import Known
from tests.support.waiting import eventually

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

READY_TIMEOUT_S = 120.0
# Whoever is silent for so long counts as dead ...
WORKER_TIMEOUT_S = RANK_TIMEOUT_S = 2.0
ORCHESTRATOR_TIMEOUT_S = 4.0
# ... all that a request may wait for ...
EVENT_TIMEOUT_S = 4.0
# ... and how long everything is stopped.
FREEZE_S = 6.0
LONG_ANSWER = (tuple(number * 31 % 97 + 3 for number in range(60)), 200)
LONG_PROMPT = (tuple(number * 31 % 97 + 3 for number in range(1000)), 4)


@pytest.fixture
def cluster(known: Known, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """Prefill and decode of two ranks, in which everybody is impatient."""

    def impatient_workers(*args: object, **files: object) -> tuple[WorkerConfig, ...]:
        changes = {
            "heartbeat_s": 0.2,
            "orchestrator_timeout_s": ORCHESTRATOR_TIMEOUT_S,
            "lease_s": EVENT_TIMEOUT_S,
            "ack_timeout_s": EVENT_TIMEOUT_S,
            "step_stall_s": EVENT_TIMEOUT_S,
        }
        return tuple(dataclasses.replace(worker, **changes) for worker in process_plan.plan_workers(*args, **files))  # type: ignore[arg-type]

    def impatient_orchestrator(topology: Topology, control: str, **files: Path) -> process_plan.ProcessPlan:
        patience = {
            "heartbeat": 0.2,
            "worker-timeout": WORKER_TIMEOUT_S,
            "token-timeout": EVENT_TIMEOUT_S,
            "prefill-timeout": EVENT_TIMEOUT_S,
            "reserve-timeout": EVENT_TIMEOUT_S,
            "client-stall": EVENT_TIMEOUT_S,
        }
        planned = process_plan.plan_orchestrator(topology, control, **files)
        flags = tuple(part for key, value in patience.items() for part in (f"--{key}-s", str(value)))
        return process_plan.ProcessPlan(
            name=planned.name, module=planned.module, arguments=planned.arguments + flags, workers=planned.workers
        )

    monkeypatch.setattr("launch.cluster.plan_workers", impatient_workers)
    monkeypatch.setattr("launch.cluster.plan_orchestrator", impatient_orchestrator)
    pools = Pools(
        prefill=PoolConfig(kv_cache_bytes=16 << 20, threads=1, max_step_tokens=32),
        decode=PoolConfig(kv_cache_bytes=16 << 20, threads=1, tp=2),
    )
    topology = Topology(
        model=str(known.folder),
        dtype="float32",
        kv_transport="tcp",
        native_kernels=False,
        prefix_cache=False,
        collective_timeout_s=RANK_TIMEOUT_S,
        pools=pools,
    )
    with LocalCluster(topology, ready_timeout_s=READY_TIMEOUT_S) as cluster:
        yield cluster


@contextlib.contextmanager
def stopped(pids: list[int], seconds: float) -> Iterator[None]:
    """Stop processes for a while: the subject, so this is no wait for anything."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


class Answer:
    """One request in flight and its tokens so far."""

    def __init__(self, client: Client, prompt: tuple[int, ...], max_tokens: int) -> None:
        self.tokens: list[int] = []
        self._pool = ThreadPoolExecutor(1)
        self._end = self._pool.submit(self._follow, client, prompt, max_tokens)

    def result(self) -> list[int]:
        """All tokens. Raises what ended the request otherwise."""
        self._end.result(60)
        self._pool.shutdown()
        return self.tokens

    @property
    def ended(self) -> bool:
        return self._end.done()

    def _follow(self, client: Client, prompt: tuple[int, ...], max_tokens: int) -> None:
        for event in client.generate(prompt, Sampling(max_tokens=max_tokens, ignore_eos=True)):
            if isinstance(event, Tokens):
                assert event.first_index == len(self.tokens)
                self.tokens.extend(event.token_ids)
            elif isinstance(event, Finished):
                # A pause is no failure of anybody.
                assert event.num_recoveries == 0


def test_an_answer_goes_on(cluster: LocalCluster, good: dict[tuple[int, ...], tuple[int, ...]]) -> None:
    with (
        Client(cluster.endpoint, timeout_s=60.0) as client,
        Admin(cluster.endpoint, token_file=cluster.admin_token_file) as admin,
    ):
        # Everything below the launcher but the sweeper, which waits for the launcher alone.
        everybody = {
            child.name(): child.pid
            for top in cluster.processes
            for child in (psutil.Process(top.pid), *psutil.Process(top.pid).children(recursive=True))
            if not child.name().startswith("encode-")
        }
        assert {"orchestrator", "encoders", "prefill-0", "decode-0", "fork-server", "decode-0.1"} == set(everybody)
        workers = [pid for name, pid in everybody.items() if name not in ("orchestrator", "encoders")]
        for prompt, answer in good.items():
            assert tuple(Answer(client, prompt, len(answer)).result()) == answer
        undisturbed = {work: Answer(client, *work).result() for work in (LONG_ANSWER, LONG_PROMPT)}

        def play(
            work: tuple[tuple[int, ...], int], pids: list[int], seconds: float, begun: Callable[[Answer], object]
        ) -> None:
            answer = Answer(client, *work)
            eventually(lambda: begun(answer), "the request's begin")
            with stopped(pids, seconds):
                assert not answer.ended, "too short an answer: the stop came after its end"
            assert answer.result() == undisturbed[work]
            assert cluster.deaths == ()

        def decoding(answer: Answer) -> object:
            return len(answer.tokens) > 20

        def prefilling(answer: Answer) -> object:
            return any(worker.num_requests for worker in admin.cluster().workers if worker.name == "prefill-0")

        everyone = list(everybody.values())
        play(LONG_ANSWER, everyone, FREEZE_S, decoding)
        play(LONG_PROMPT, everyone, FREEZE_S, prefilling)
        # Neighbours: some alone, for less time than the others wait for them.
        play(LONG_ANSWER, [everybody["orchestrator"]], 1.3 * WORKER_TIMEOUT_S, decoding)
        play(LONG_ANSWER, workers, 0.4 * WORKER_TIMEOUT_S, decoding)
        play(LONG_ANSWER, [everybody["decode-0.1"]], 0.4 * RANK_TIMEOUT_S, decoding)
        wait_until(lambda: admin.cluster().num_requests == 0, "idle")
        assert [gone.name for gone in admin.cluster().departures] == []
