"""When measured rows are a reason to move experts, and when not."""

from __future__ import annotations

import random

import pytest

from anabranch.errors import MalformedMessage
from anabranch.parallel.expert_placement import imbalance, place
from orchestrator.ffn_balance import MIN_ROWS_PER_EXPERT, FfnBalance
from orchestrator.ffn_member import experts_of
from orchestrator.ffn_plan import FfnPlan

pytestmark = pytest.mark.unit

LAYERS = ((4, 10), (1, 20))
HOLDINGS = (((0, 1), (0,)), ((2, 3), ()))
SKEWED = ((600, 200, 100, 100), ())
EVEN = ((250, 250, 250, 250), ())


def test_an_uneven_load_is_due_once_in_a_cool_down() -> None:
    balance = FfnBalance(100)
    balance.add(SKEWED, LAYERS, 1000.0)
    assert not balance.is_due(HOLDINGS, LAYERS, 1099.0)
    assert balance.is_due(HOLDINGS, LAYERS, 1100.0)
    balance.moved(1100.0)
    assert not balance.is_due(HOLDINGS, LAYERS, 1199.0)
    assert balance.is_due(HOLDINGS, LAYERS, 1200.0)
    # Where nothing came of it, it is looked at again after a part of the cool-down.
    assert not balance.is_due(HOLDINGS, LAYERS, 1209.0)
    assert balance.is_due(HOLDINGS, LAYERS, 1210.0)


def test_an_even_load_a_small_one_and_none_are_never_due() -> None:
    for rows in (EVEN, ((300, 250, 250, 200), ()), ((4 * MIN_ROWS_PER_EXPERT - 1, 0, 0, 0), ())):
        balance = FfnBalance(1)
        balance.add(rows, LAYERS, 0.0)
        assert not balance.is_due(HOLDINGS, LAYERS, 1.0)
    off = FfnBalance(0)
    off.add(SKEWED, LAYERS, 0.0)
    assert off.loads(LAYERS) is None
    assert not off.is_due(HOLDINGS, LAYERS, 1e9)
    given_up = FfnBalance(1)
    given_up.add(SKEWED, LAYERS, 0.0)
    given_up.give_up()
    assert not given_up.is_due(HOLDINGS, LAYERS, 1e9)
    assert given_up.loads(LAYERS) is None


def test_rows_are_forgotten_by_halves() -> None:
    balance = FfnBalance(100)
    balance.add(SKEWED, LAYERS, 0.0)
    assert balance.loads(LAYERS) == ((600.0, 200.0, 100.0, 100.0), (1.0,))
    balance.add(((0, 0, 0, 50), ()), LAYERS, 50.0)
    assert balance.loads(LAYERS) == ((300.0, 100.0, 50.0, 100.0), (1.0,))
    balance.add(((0, 0, 0, 0), ()), LAYERS, 1e6)
    assert balance.loads(LAYERS) is None


@pytest.mark.parametrize("rows", [(), ((1, 2, 3, 4),), ((1, 2, 3), ()), ((1, 2, 3, 4), (5,)), ((1, 2, 3, 4), (), ())])
def test_rows_of_another_model_are_refused(rows: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(MalformedMessage, match="rows of experts that the model has not"):
        FfnBalance(1).add(rows, LAYERS, 0.0)


def test_imbalance_is_that_of_the_busiest_in_each_layer() -> None:
    holdings = HOLDINGS
    assert imbalance(holdings, [(600.0, 200.0, 100.0, 100.0), (1.0,)]) == pytest.approx(1.6)
    assert imbalance(holdings, [(1.0, 1.0, 1.0, 1.0), (1.0,)]) == 1.0
    # Two layers, busy at different workers: each makes everybody wait.
    twice = (((0,), (0,)), ((1,), (1,)))
    assert imbalance(twice, [(3.0, 1.0), (1.0, 3.0)]) == pytest.approx(1.5)
    # Copies share.
    assert imbalance([((0, 1),), ((0,),)], [(4.0, 1.0)]) == pytest.approx(1.2)
    for nothing in ([], [(0.0, 0.0)], [(1.0,)]):
        assert imbalance([((0, 1),)], nothing) == 1.0
    assert imbalance([], [(1.0, 1.0)]) == 1.0


def plan(**changes: object) -> FfnPlan:
    held = {"a": frozenset({(0, 0), (0, 1), (1, 0)}), "b": frozenset({(0, 2), (0, 3)})}
    given: dict[str, object] = {
        "layers": LAYERS,
        "capacities": {"a": 0, "b": 0},
        "replicas": 1,
        "held": held,
        "loads": tuple(tuple(map(float, rows)) or (1.0,) for rows in SKEWED),
        "for_load": True,
    }
    return FfnPlan(**{**given, **changes})  # type: ignore[arg-type]


def test_experts_move_for_the_load_where_that_helps_and_there_is_room_for_both() -> None:
    made = plan().make()
    assert made is not None
    assert made.measured
    assert imbalance(made.holdings.values(), plan().loads or ()) <= 1.3
    # An even load is no reason; nor is one that no placement could even out: a copy has nowhere to be.
    assert plan(loads=((1.0,) * 4, (1.0,))).make() is None
    assert plan(loads=None).make() is None
    assert plan(capacities={"a": 40, "b": 20}).make() is None
    # In a plan that has to be made anyway, loads count, and nothing forbids it.
    assert plan(loads=((1.0,) * 4, (1.0,)), for_load=False).make() is not None


def test_without_room_a_plan_goes_without_loads_and_says_what_is_missing() -> None:
    made = plan(for_load=False, capacities={"a": 30, "b": 30}).make()
    assert made is not None
    assert {expert for holding in made.holdings.values() for expert in holding[0]} == {0, 1, 2, 3}
    fewer = plan(for_load=False, replicas=2, loads=None, capacities={"a": 60, "b": 10}).make()
    assert fewer is not None
    assert not fewer.problem
    none = plan(for_load=False, capacities={"a": 20, "b": 10}).make()
    assert none is not None
    assert not none.holdings
    assert "capacity" in none.problem


def test_measured_placements_leave_a_worker_without_limit_little_more_than_its_share() -> None:
    rng = random.Random(5)
    layers = ((16, 10),) * 6
    names = [f"n{number}" for number in range(4)]
    loads = tuple(tuple(1000.0 / rank**1.6 for rank in rng.sample(range(1, 17), 16)) for _ in layers)
    evenly = place(layers, dict.fromkeys(names, 0), replicas=1)
    assert imbalance(evenly.values(), loads) >= 2.0
    made = FfnPlan(
        layers=layers,
        capacities=dict.fromkeys(names, 0),
        replicas=1,
        held={name: experts_of(evenly[name]) for name in names},
        loads=loads,
        for_load=True,
    ).make()
    assert made is not None
    num_bytes = [10 * sum(map(len, holding)) for holding in made.holdings.values()]
    assert max(num_bytes) <= 1.25 * 6 * 16 * 10 / 4 + 10
    assert imbalance(made.holdings.values(), loads) <= 1.3
