"""A launcher starts as many FFN workers as are wanted, drains the youngest, and says what it could not do."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from anabranch_client import InvalidRequest, Unavailable
from launch import ffn_scale
from launch.ffn_scale import FfnScale
from tests.support.in_process import wait_until
from tests.support.resources import our_threads

pytestmark = pytest.mark.unit


class Fakes:
    """Processes and the orchestrator in one: who starts registers at once, who is drained ends at once."""

    def __init__(self) -> None:
        self.numbers: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()
        self.names = ["ffn-0"]
        self.leaving: list[str] = []
        self.drained: list[str] = []
        self.refuses: Exception | None = None
        self.told_max = 0
        self.closed = threading.Event()

    # Of the orchestrator.
    def follow_ffn_scale(self, max_workers: int) -> Iterator[int]:
        self.told_max = max_workers
        while True:
            number = self.numbers.get()
            if isinstance(number, Exception):
                raise number
            yield number

    def cluster(self) -> SimpleNamespace:
        return SimpleNamespace(workers=[SimpleNamespace(name=name) for name in self.names])

    def drain(self, name: str) -> None:
        if self.refuses is not None:
            raise self.refuses
        assert name in self.leaving
        self.drained.append(name)
        self.names.remove(name)

    def close(self) -> None:
        self.closed.set()
        self.numbers.put(ValueError("Cannot invoke RPC on closed channel!"))

    # Of the launcher.
    def ffn_workers(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in self.leaving)

    def start_ffn_worker(self) -> str:
        if self.refuses is not None:
            raise self.refuses
        self.names.append(f"ffn-{len(self.names)}")
        return self.names[-1]

    def expect_leave(self, name: str) -> None:
        self.leaving.append(name)

    def running(self, name: str) -> bool:
        return name in self.names


@pytest.fixture
def fakes() -> Fakes:
    return Fakes()


@pytest.fixture
def said(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a follower says, which runs meanwhile."""
    monkeypatch.setattr(ffn_scale, "AGAIN_S", 0.01)
    before, told = our_threads(), []
    scale = FfnScale(fakes, fakes, 7, told.append)  # type: ignore[arg-type]
    yield told
    scale.stop()
    scale.stop()
    assert fakes.closed.is_set()
    assert our_threads() == before


def test_it_starts_and_drains_as_it_is_told_also_after_a_break(fakes: Fakes, said: list[str]) -> None:
    for number, names in ((0, 1), (3, 3), (3, 3), (1, 1)):
        fakes.numbers.put(number)
        wait_until(lambda: fakes.numbers.empty() and len(fakes.names) == names, f"{names} workers")  # noqa: B023
    wait_until(lambda: fakes.drained == ["ffn-2", "ffn-1"], "the youngest to go first")
    fakes.numbers.put(Unavailable("gone", code="unavailable"))
    fakes.leaving.clear()
    fakes.numbers.put(2)
    wait_until(lambda: fakes.names == ["ffn-0", "ffn-1"], "a new stream to be followed")
    assert fakes.told_max == 7
    assert said == []


def test_what_cannot_be_done_is_said(fakes: Fakes, said: list[str]) -> None:
    fakes.refuses = OSError("no more processes")
    fakes.numbers.put(2)
    wait_until(lambda: said == ["no more ffn workers: no more processes"], "a word")
    fakes.refuses = None
    fakes.numbers.put(2)
    wait_until(lambda: len(fakes.names) == 2, "another try")
    fakes.refuses = InvalidRequest("'ffn-1' is no living worker", code="invalid_request")
    fakes.numbers.put(1)
    wait_until(lambda: said[1:] == ["ffn-1 is not drained: 'ffn-1' is no living worker"], "a word")


def test_a_worker_that_does_not_come_in_time_is_said(
    fakes: Fakes, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ffn_scale, "SCALE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(fakes, "cluster", lambda: SimpleNamespace(workers=[]))
    fakes.numbers.put(2)
    wait_until(lambda: said == ["ffn_scale_timeout_s: ffn-1 not registered after 0.05 s"], "a word")
