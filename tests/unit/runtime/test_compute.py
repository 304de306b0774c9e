"""The driving rank's thread: one order for commands and steps, errors where they are waited for."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import msgspec
import pytest
import torch

from anabranch.engine.pending import PendingResult
from anabranch.errors import DeadlineExceeded, InvalidRequest, WorkerDied
from anabranch.step.plan import StepPlan
from runtime.compute import ComputeThread
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.unit


class Say(msgspec.Struct, frozen=True):
    text: str


class Listed:
    """Writes down what it is told; waits in steps until it may go on; fails where it is told to."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.num_threads: set[int] = set()
        self.go_on = threading.Event()

    def handle(self, command: Say) -> None:
        if command.text == "fail":
            raise InvalidRequest("was told to fail", "text")
        self.done.append(command.text)

    def step(self, plan: StepPlan) -> PendingResult:
        assert self.go_on.wait(WAIT_S)
        self.num_threads.add(torch.get_num_threads())
        if plan.step == 13:
            raise ZeroDivisionError("thirteen")
        self.done.append(f"step {plan.step}")
        return PendingResult(plan.step)

    def close(self) -> None: ...


class World:
    def __init__(self, meaning: WorkerDied | None = None) -> None:
        self.rank = Listed()
        self.errors: list[Exception] = []
        self.meaning = meaning
        self.thread = ComputeThread[Say](self.rank, 1, torch.device("cpu"), self.failed)

    def failed(self, error: Exception) -> Exception:
        self.errors.append(error)
        return self.meaning or error


@pytest.fixture
def world() -> Iterator[World]:
    found = World()
    yield found
    found.rank.go_on.set()
    assert found.thread.stop(WAIT_S)


def plan(step: int) -> StepPlan:
    return StepPlan(step=step, sequences=())


def test_commands_and_steps_are_done_in_the_order_of_sending(world: World) -> None:
    world.thread.send(Say("one"))
    first = world.thread.launch(plan(1))
    world.thread.send(Say("two"))
    second = world.thread.launch(plan(2))
    ended = threading.Event()
    second.future.add_done_callback(lambda _: ended.set())
    assert not first.done
    with pytest.raises(DeadlineExceeded, match="step_timeout_s: step 1"):
        first.result(0.01)
    world.rank.go_on.set()
    assert second.result(WAIT_S).step == 2
    assert first.done
    assert ended.wait(WAIT_S)
    assert first.result(0.0).step == 1
    assert world.rank.done == ["one", "step 1", "two", "step 2"]
    assert world.rank.num_threads == {1}


def test_a_step_that_fails_raises_where_it_is_waited_for_and_ends_nothing(world: World) -> None:
    world.rank.go_on.set()
    failing = world.thread.launch(plan(13))
    with pytest.raises(ZeroDivisionError, match="thirteen"):
        failing.result(WAIT_S)
    world.thread.send(Say("fail"))
    assert world.thread.launch(plan(2)).result(WAIT_S).step == 2
    assert [type(error) for error in world.errors] == [ZeroDivisionError, InvalidRequest]


def test_an_error_is_what_it_means_to_the_ranks() -> None:
    died = WorkerDied("the ranks cannot go on")
    world = World(died)
    world.rank.go_on.set()
    with pytest.raises(WorkerDied) as caught:
        world.thread.launch(plan(13)).result(WAIT_S)
    assert caught.value is died
    assert world.thread.stop(WAIT_S)


def test_an_error_that_a_device_reports_late_counts_as_well() -> None:
    class Late(PendingResult):
        def result(self):  # type: ignore[no-untyped-def]
            raise RuntimeError("device-side")

    world = World(WorkerDied("the ranks cannot go on"))
    world.rank.step = lambda plan: Late(plan.step)  # type: ignore[method-assign]
    launched = world.thread.launch(plan(1))
    with pytest.raises(WorkerDied):
        launched.result(WAIT_S)
    assert str(world.errors[0]) == "device-side"
    assert world.thread.stop(WAIT_S)


def test_stop_ends_after_what_was_sent_and_waits_no_longer_than_it_may(world: World) -> None:
    launched = world.thread.launch(plan(1))
    assert not world.thread.stop(0.01)
    world.rank.go_on.set()
    assert launched.result(WAIT_S).step == 1
    assert world.thread.stop(WAIT_S)
