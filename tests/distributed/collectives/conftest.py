"""Ranks as real processes: forked, joined in a group, watched, and never left behind."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.support.waiting import WAIT_S
from transport.collectives import CollectiveGroup, create_group

Body = Callable[[CollectiveGroup], object]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a rank ended: its value, or the error that it raised, or the signal that ended it."""

    value: object = None
    error: str = ""
    message: str = ""
    signal: int = 0


class Ranks:
    """Starts the ranks of one group and collects their outcomes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pids: dict[int, int] = {}
        self._num_started = 0
        self._start_one: Callable[[int], int] = lambda rank: -1

    def start(
        self,
        size: int,
        body: Body,
        *,
        backend: str = "shm",
        timeout_s: float | Sequence[float] = WAIT_S,
        ranks: range | None = None,
    ) -> list[int]:
        """Fork the ranks, with one timeout or one for each; gives their process ids."""
        timeouts_s = [timeout_s] * size if isinstance(timeout_s, float) else list(timeout_s)
        self._num_started += 1
        self.meeting = self.folder / f"meeting-{self._num_started}"
        self.meeting.mkdir(mode=0o700)

        def start_one(rank: int) -> int:
            pid = os.fork()
            if pid == 0:
                # What the parent left uncollected (a closed UCX worker, say) still shares descriptors with it:
                # its destructor must not run here.
                gc.disable()
                self._run(rank, size, body, backend, timeouts_s)
            self._pids[pid] = rank
            return pid

        self._start_one = start_one
        return [start_one(rank) for rank in ranks or range(size)]

    def start_late(self, rank: int) -> int:
        """Fork one more rank of the group that `start` began."""
        return self._start_one(rank)

    def wait(self, deadline_s: float = WAIT_S) -> list[Outcome]:
        """The outcomes of all ranks that are left, in rank order."""
        return [self.wait_for(rank, deadline_s) for rank in sorted(self._pids.values())]

    def wait_for(self, rank: int, deadline_s: float = WAIT_S) -> Outcome:
        """One rank's outcome; fails the test if it is still there at the deadline."""
        (pid,) = (pid for pid, other in self._pids.items() if other == rank)
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self._pids[pid]
                return self._outcome(rank, status)
            time.sleep(0.002)
        raise AssertionError(f"rank {rank} hangs")

    def run(self, size: int, body: Body, *, backend: str = "shm", timeout_s: float = WAIT_S) -> list[object]:
        """Start, wait, and give the values; a rank's error fails the test."""
        self.start(size, body, backend=backend, timeout_s=timeout_s)
        outcomes = self.wait()
        for rank, outcome in enumerate(outcomes):
            assert not outcome.error, f"rank {rank}: {outcome.error}: {outcome.message}"
            assert not outcome.signal, f"rank {rank} was ended by signal {outcome.signal}"
        return [outcome.value for outcome in outcomes]

    def stop(self) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._pids.clear()

    def _run(self, rank: int, size: int, body: Body, backend: str, timeouts_s: list[float]) -> None:
        outcome: dict[str, object]
        try:
            torch.set_num_threads(1)
            group = create_group(
                backend,
                rank=rank,
                size=size,
                rendezvous=self.meeting,
                collective_timeout_s=timeouts_s[rank],
                start_timeout_s=max(timeouts_s),
            )
            try:
                outcome = {"value": body(group)}
            finally:
                group.close()
        except BaseException as error:
            text = str(error) if type(error) is not AssertionError else traceback.format_exc()
            outcome = {"error": type(error).__name__, "message": text}
        (self.meeting / f"outcome-{rank}").write_text(json.dumps(outcome))
        os._exit(0)

    def _outcome(self, rank: int, status: int) -> Outcome:
        if os.WIFSIGNALED(status):
            return Outcome(signal=os.WTERMSIG(status))
        return Outcome(**json.loads((self.meeting / f"outcome-{rank}").read_text()))


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    made = Ranks(tmp_path)
    yield made
    made.stop()
