"""The number of lanes: by what attention, FFN and the way between them were measured to take."""

from __future__ import annotations

import itertools

import pytest

from anabranch.schedule.lane_costs import MAX_LANES, CostFit, LaneCosts, LinearCost

pytestmark = pytest.mark.unit


def costs(attention: tuple[float, float], ffn: tuple[float, float], way_s: float = 0.0) -> LaneCosts:
    return LaneCosts(
        attention=LinearCost(fixed_s=attention[0], row_s=attention[1]),
        ffn=LinearCost(fixed_s=ffn[0], row_s=ffn[1]),
        way_s=way_s,
    )


def test_equal_halves_that_grow_with_their_rows_gain_twice_by_two_lanes() -> None:
    even = costs((0.0, 1.0), (0.0, 1.0))
    assert even.step_s(64, 1) == 2 * even.step_s(64, 2)
    assert even.best(64, 1) == 2


def test_halves_that_only_read_weights_gain_nothing() -> None:
    assert costs((1.0, 0.0), (1.0, 0.0)).best(64, 1) == 1
    assert costs((1.0, 0.0), (1.0, 0.0)).best(64, 4) == 1


def test_a_long_way_is_hidden_by_more_lanes() -> None:
    assert costs((0.0, 1.0), (0.0, 1.0), way_s=64.0).best(64, 1) > 2


@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_there_are_never_more_lanes_than_rows(rows: int) -> None:
    assert costs((0.0, 1.0), (0.0, 1.0), way_s=9.0).best(rows, 4) <= max(1, rows)


def test_a_small_gain_changes_nothing() -> None:
    # Two lanes are better by 5 of 100.
    nearly = costs((0.0, 1.0), (0.0, 0.05))
    assert nearly.step_s(64, 2) < nearly.step_s(64, 1)
    assert nearly.best(64, 1) == 1
    assert nearly.best(64, 2) == 2


def test_the_best_is_the_best_of_all() -> None:
    values = [0.0, 0.5, 3.0]
    for a0, a1, f0, f1, way_s in itertools.product(values, values, values, values, [0.0, 20.0]):
        found = costs((a0, a1), (f0, f1), way_s)
        best = min(found.step_s(64, lanes) for lanes in range(1, MAX_LANES + 1))
        assert found.step_s(64, found.best(64, 1)) <= best / (1 - 0.08) + 1e-9


def test_a_fit_finds_a_line() -> None:
    fit = CostFit()
    for index in range(400):
        rows = 1 + index % 64
        fit.add(rows, 0.002 + 0.0001 * rows)
    cost = fit.cost()
    assert cost.at(64) == pytest.approx(0.0084, rel=0.05)
    assert cost.at(8) == pytest.approx(0.0028, rel=0.1)


def test_a_fit_of_one_size_takes_half_of_it_for_fixed() -> None:
    fit = CostFit()
    for _ in range(100):
        fit.add(16, 1.0)
    cost = fit.cost()
    assert cost.at(16) == pytest.approx(1.0)
    assert cost.fixed_s == pytest.approx(0.5)


def test_a_fit_forgets() -> None:
    fit = CostFit()
    for taken_s in (1.0,) * 500 + (2.0,) * 300:
        fit.add(8, taken_s)
    assert fit.cost().at(8) == pytest.approx(2.0, rel=0.01)


def test_a_fit_is_never_negative() -> None:
    fit = CostFit()
    for rows, taken_s in ((1, 5.0), (64, 0.1), (2, 4.0), (60, 0.2)) * 20:
        fit.add(rows, taken_s)
    cost = fit.cost()
    assert cost.row_s == 0.0
    assert cost.fixed_s > 0
    assert CostFit().cost() == LinearCost()
