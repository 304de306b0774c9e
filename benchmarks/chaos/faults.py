"""Faults of workers: killed, stopped for a moment, stopped until they count as dead. One of each role always lives."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable

from anabranch_client import Admin, Worker
from launch.cluster import LocalCluster

# Less than the orchestrator's default worker_timeout_s (3 s) ...
SHORT_STOP_S = 1.0
# ... and the longest wait for a death to show, for a worker to be given work, or for one to come back.
NOTICE_TIMEOUT_S = 30.0


class Faults:
    """Plays faults by chance.

    Attributes:
        counts: of each kind that was played.
    """

    def __init__(self, cluster: LocalCluster, admin: Admin, seed: int) -> None:
        self._cluster = cluster
        self._admin = admin
        self._dice = random.Random(seed)
        self.counts: Counter[str] = Counter()

    def play(self) -> None:
        """One fault of some worker that has work; it has shown when this returns."""
        kind = self._dice.choice(("kill", "kill", "short stop", "long stop"))
        workers = self._admin.cluster().workers
        roles = Counter(worker.role for worker in workers)
        # The launcher starts a worker again that went; until it is back its role has one less.
        spare = [worker for worker in workers if roles[worker.role] > 1]
        if not spare:
            kind = "short stop"
        victim = self._dice.choice(spare or list(workers))
        if victim.role != "ffn":
            _wait(lambda: self._busy(victim), f"{victim.name} to have work")
        if kind == "kill":
            os.kill(victim.pid, signal.SIGKILL)
            _wait(lambda: not self._lives(victim), f"the death of {victim.name} to show")
        elif kind == "short stop":
            self._stop_for(victim, SHORT_STOP_S)
        else:
            os.kill(victim.pid, signal.SIGSTOP)
            try:
                _wait(lambda: not self._lives(victim), f"the silence of {victim.name} to show")
            finally:
                os.kill(victim.pid, signal.SIGCONT)
        self.counts[kind] += 1
        time.sleep(self._dice.random())

    @property
    def num_deaths(self) -> int:
        return self.counts["kill"] + self.counts["long stop"]

    def _stop_for(self, victim: Worker, seconds: float) -> None:
        os.kill(victim.pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            os.kill(victim.pid, signal.SIGCONT)

    def _find(self, victim: Worker) -> Worker | None:
        return next((worker for worker in self._admin.cluster().workers if worker.pid == victim.pid), None)

    def _lives(self, victim: Worker) -> bool:
        return self._find(victim) is not None

    def _busy(self, victim: Worker) -> bool:
        found = self._find(victim)
        return found is None or found.num_requests > 0


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + NOTICE_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {NOTICE_TIMEOUT_S:g} s")
        time.sleep(0.02)
