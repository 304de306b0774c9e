"""The engine's thread: commands go before steps, idleness waits, and a failure ends nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from anabranch.engine.faults import MAX_IN_A_ROW
from anabranch.engine.loop import EngineLoop
from tests.support.waiting import WAIT_S, eventually

pytestmark = pytest.mark.unit


class Engine:
    """Steps while there is work; what happened, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.work = 0
        self.idle = threading.Event()
        self.threads: set[str] = set()

    def step(self) -> bool:
        self.threads.add(threading.current_thread().name)
        if not self.work:
            self.idle.set()
            return False
        self.work -= 1
        self.events.append("step")
        return True


def unexpected(error: Exception) -> None:
    raise AssertionError(f"given up: {error}")


Start = Callable[[Engine], EngineLoop]


@pytest.fixture
def start() -> Iterator[Start]:
    loops: list[EngineLoop] = []

    def run(engine: Engine) -> EngineLoop:
        loop = EngineLoop("engine-under-test", engine.step, unexpected)
        loops.append(loop)
        loop.start()
        return loop

    yield run
    for loop in loops:
        assert loop.stop(WAIT_S)


def do(loop: EngineLoop, action: Callable[[], object] = lambda: None) -> None:
    """Run an action on the engine's thread and wait for it."""
    done = threading.Event()

    def run() -> None:
        try:
            action()
        finally:
            done.set()

    loop.submit(run)
    assert done.wait(WAIT_S)


def test_commands_that_wait_run_before_the_next_step(start: Start) -> None:
    engine = Engine()
    engine.work = 3
    loop = EngineLoop("engine-under-test", engine.step, unexpected)
    for name in "abc":
        loop.submit(lambda name=name: engine.events.append(name))
    loop.start()
    assert engine.idle.wait(WAIT_S)
    assert engine.events == ["a", "b", "c", "step", "step", "step"]
    assert engine.threads == {"engine-under-test"}
    assert loop.stop(WAIT_S)


def test_an_idle_engine_sleeps_until_a_command_comes(start: Start) -> None:
    engine = Engine()
    loop = start(engine)
    assert engine.idle.wait(WAIT_S)

    def bring_work() -> None:
        engine.idle.clear()
        engine.work = 2

    do(loop, bring_work)
    assert engine.idle.wait(WAIT_S)
    assert engine.events == ["step", "step"]


def test_what_fails_is_logged_and_ends_nothing(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    loop = start(engine)

    def fail() -> None:
        raise RuntimeError("the command is wrong")

    do(loop, fail)
    engine.work = 1
    do(loop)
    engine.idle.clear()
    do(loop)
    assert engine.idle.wait(WAIT_S)
    assert engine.events == ["step"]
    assert "the command is wrong" in caplog.text


def test_a_step_that_fails_is_tried_again_after_the_commands(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    failures = 2
    engine = Engine()

    def step() -> bool:
        nonlocal failures
        if failures:
            failures -= 1
            raise RuntimeError("the step is wrong")
        return engine.step()

    loop = EngineLoop("engine-under-test", step, unexpected)
    loop.start()
    assert engine.idle.wait(WAIT_S)
    assert [record.getMessage() for record in caplog.records] == [
        "a step of the engine: RuntimeError: the step is wrong"
    ]
    assert loop.stop(WAIT_S)


def test_stop_waits_for_the_step_in_progress_and_no_longer_than_it_may() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def step() -> bool:
        begun.set()
        assert go_on.wait(WAIT_S)
        return False

    loop = EngineLoop("engine-under-test", step, unexpected)
    loop.start()
    assert begun.wait(WAIT_S)
    assert not loop.stop(0.05)
    go_on.set()
    assert loop.stop(WAIT_S)


def test_steps_that_do_nothing_but_raise_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    num_steps = 0
    broken: list[Exception] = []

    def step() -> bool:
        nonlocal num_steps
        num_steps += 1
        raise RuntimeError("the step is wrong")

    loop = EngineLoop("engine-under-test", step, broken.append)
    loop.start()
    eventually(lambda: broken, "the end of steps")
    for _ in range(50):  # commands are still run, as the worker's end needs
        do(loop)
    assert loop.stop(WAIT_S)
    assert num_steps == MAX_IN_A_ROW
    assert [str(error) for error in broken] == ["the step is wrong"]
    assert [record.getMessage() for record in caplog.records] == [
        "a step of the engine: RuntimeError: the step is wrong",
        "a step of the engine: RuntimeError: the step is wrong (10 times)",
    ]


def test_steps_that_now_and_then_succeed_are_not(caplog: pytest.LogCaptureFixture) -> None:
    num_steps = 0

    def step() -> bool:
        nonlocal num_steps
        num_steps += 1
        if num_steps % MAX_IN_A_ROW:
            raise RuntimeError(f"the step is wrong in way {num_steps % 2}")
        return num_steps < 5 * MAX_IN_A_ROW

    loop = EngineLoop("engine-under-test", step, unexpected)
    loop.start()
    eventually(lambda: num_steps >= 5 * MAX_IN_A_ROW, "steps")
    assert loop.stop(WAIT_S)
    assert len(caplog.records) == 2 * 2  # each error once, and once more at the tenth
