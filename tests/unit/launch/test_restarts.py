"""When a worker that died is started again, told the time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from anabranch.config.topology import RestartConfig
from anabranch.errors import ConfigError
from launch.restarts import Restarts
from launch.supervisor import Supervisor
from tests.support.waiting import eventually

pytestmark = pytest.mark.unit


def test_waits_double_up_to_half_a_minute() -> None:
    restarts = Restarts(20)
    now_s, waits_s = 0.0, []
    for _ in range(9):
        wait_s = restarts.died(now_s)
        assert wait_s is not None
        waits_s.append(wait_s)
        now_s += wait_s + 1.0
    assert waits_s == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_after_a_steady_minute_waits_begin_anew() -> None:
    restarts = Restarts(20)
    assert [restarts.died(0.0), restarts.died(1.0)] == [0.5, 1.0]
    assert restarts.died(2.0 + 59.0) == 2.0
    assert restarts.died(63.0 + 60.0) == 0.5


def test_so_many_starts_in_ten_minutes_and_no_more() -> None:
    restarts = Restarts(2)
    assert restarts.died(0.0) == 0.5
    assert restarts.died(100.0) == 0.5
    assert restarts.died(200.0) is None
    # The first, at 0.5 s, does not count any more.
    assert restarts.died(600.5) == 0.5
    assert restarts.died(601.5) is None


Make = Callable[..., Supervisor]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Supervisor] = []

    def build(config: RestartConfig, start: Callable[[str], None], say: Callable[[str], None]) -> Supervisor:
        made.append(Supervisor(config, start, lambda name: True, say))
        return made[-1]

    yield build
    for supervisor in made:
        supervisor.stop()


def test_a_start_that_fails_is_tried_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.restarts.FIRST_WAIT_S", 0.01)
    said: list[str] = []
    failures = [OSError("no room")] * 2

    def start(name: str) -> None:
        if failures:
            raise failures.pop()

    supervisor = make(RestartConfig(max_per_10min=3), start, said.append)
    assert supervisor.died("decode-0") == 0.01
    eventually(lambda: said[-1:] == ["decode-0 is back"])
    assert said == [
        "decode-0 cannot be started (no room); again in 0.02 s",
        "decode-0 cannot be started (no room); again in 0.04 s",
        "decode-0 is back",
    ]
    assert supervisor.died("decode-0") is None
    assert not supervisor.expects("decode-0")


def test_nothing_is_started_that_nobody_wants(make: Make) -> None:
    started = threading.Event()
    supervisor = make(RestartConfig(), lambda name: started.set(), print)
    assert supervisor.died("ffn-1") == 0.5
    assert supervisor.expects("ffn-1")
    supervisor.forget("ffn-1")
    assert not supervisor.expects("ffn-1")
    assert supervisor.died("ffn-2") == 0.5
    supervisor.stop()
    assert not started.is_set()
    assert supervisor.died("ffn-3") is None
    assert make(RestartConfig(policy="never"), lambda name: started.set(), print).died("ffn-0") is None


@pytest.mark.parametrize("max_per_10min", [0, -1, 1001])
def test_a_budget_out_of_bounds_is_named(max_per_10min: int) -> None:
    with pytest.raises(ConfigError, match="max_per_10min"):
        RestartConfig(max_per_10min=max_per_10min)
