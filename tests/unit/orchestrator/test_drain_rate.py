"""How fast the queue empties."""

from __future__ import annotations

import pytest

from orchestrator.drain_rate import MIN_BUSY_S, STALE_S, WINDOW_S, DrainRate

pytestmark = pytest.mark.unit


def drained(rate: DrainRate, from_s: float, to_s: float, tokens_per_s: int) -> None:
    """Give workers prompts of 100 ms' worth of tokens each."""
    for tenth in range(round(10 * from_s), round(10 * to_s)):
        rate.given(tokens_per_s // 10, tenth / 10)


def test_nothing_is_known_before_it_was_measured() -> None:
    rate = DrainRate()
    assert rate.tokens_per_s(0.0) is None
    rate.given(1000, 0.0)
    assert rate.tokens_per_s(10.0) is None
    rate.waiting(True, 10.0)
    rate.given(1000, 10.1)
    assert rate.tokens_per_s(10.0 + MIN_BUSY_S / 2) is None
    assert rate.tokens_per_s(10.0 + MIN_BUSY_S) == pytest.approx(1000 / MIN_BUSY_S)


def test_time_in_which_nobody_waits_does_not_count() -> None:
    rate = DrainRate()
    rate.waiting(True, 0.0)
    drained(rate, 0.0, 2.0, 500)
    rate.waiting(False, 2.0)
    drained(rate, 2.0, 50.0, 10)
    assert rate.tokens_per_s(50.0) == pytest.approx(500)
    rate.waiting(True, 50.0)
    drained(rate, 50.0, 52.0, 300)
    assert rate.tokens_per_s(52.0) == pytest.approx(400)


def test_the_window_moves_on() -> None:
    rate = DrainRate()
    rate.waiting(True, 0.0)
    drained(rate, 0.0, 30.0, 500)
    drained(rate, 30.0, 30.0 + 2 * WINDOW_S, 2000)
    assert rate.tokens_per_s(30.0 + 2 * WINDOW_S) == pytest.approx(2000, rel=0.05)
    # Workers that take nothing any more.
    assert rate.tokens_per_s(30.0 + 4 * WINDOW_S) is None


def test_what_was_long_ago_is_forgotten() -> None:
    rate = DrainRate()
    rate.waiting(True, 0.0)
    drained(rate, 0.0, 5.0, 500)
    rate.waiting(False, 5.0)
    assert rate.tokens_per_s(5.0 + STALE_S) == pytest.approx(500)
    assert rate.tokens_per_s(5.1 + STALE_S) is None
    rate.waiting(False, 5.3)
    rate.waiting(True, 6.0 + STALE_S)
    assert rate.tokens_per_s(6.0 + STALE_S) is None
    rate.given(300, 6.1 + STALE_S)
    assert rate.tokens_per_s(7.0 + STALE_S) == pytest.approx(300)


def test_what_it_keeps_is_bounded() -> None:
    rate = DrainRate()
    rate.waiting(True, 0.0)
    for step in range(100_000):
        rate.given(1, step / 1000)
    assert len(rate._buckets) < 100
