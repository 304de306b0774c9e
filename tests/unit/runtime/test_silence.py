from __future__ import annotations

import pytest

from runtime.silence import Silence

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def silence(clock: Clock) -> Silence:
    return Silence(10.0, look_every_s=1.0, clock=clock)


def test_a_rank_that_stops_speaking_is_named(silence: Silence, clock: Clock) -> None:
    for second in range(20):
        clock.now = 100.0 + second
        silence.heard(1)
        if second < 5:
            silence.heard(2)
        assert silence.look() == (2 if second > 14 else None), second


def test_a_rank_that_was_never_heard_is_not_missed(silence: Silence, clock: Clock) -> None:
    for _ in range(50):
        clock.now += 1.0
        assert silence.look() is None


def test_our_own_silence_is_not_theirs(silence: Silence, clock: Clock) -> None:
    silence.heard(1)
    clock.now += 1.0
    assert silence.look() is None
    clock.now += 60.0  # this process was stopped; two looks of it count
    assert silence.look() is None
    for _ in range(7):
        clock.now += 1.0
        assert silence.look() is None
    for _ in range(3):
        clock.now += 1.0
        found = silence.look()
    assert found == 1
