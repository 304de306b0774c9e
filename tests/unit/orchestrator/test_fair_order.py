"""In what order those who wait are served."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.fair_order import FairOrder, Waiting
from orchestrator.tenants import MAX_IDLE, Account, Tenants

pytestmark = pytest.mark.unit

STEP_S = 10.0


class World:
    """An order, and who is in it; time goes on by a second with each step."""

    def __init__(self, **weights: float) -> None:
        self.tenants = Tenants(weights)
        self.order: FairOrder[str] = FairOrder(self.tenants, STEP_S)
        self.now_s = 0.0
        self.accounts: dict[str, Account] = {}

    def put(self, item: str, tenant: str = "", priority: int = 0, tokens: int = 1, **more: bool) -> Waiting[str]:
        account = self.tenants.open(tenant)
        self.now_s += 1.0
        return self.order.put(item, account, priority, tokens, self.now_s, **more)

    def serve(self, tokens: int | None = None) -> Waiting[str]:
        head = self.order.head()
        assert head is not None
        self.order.remove(head)
        head.account.charge(head.num_tokens if tokens is None else tokens)
        self.tenants.close(head.account)
        return head

    def all(self) -> list[str]:
        return [self.serve().item for _ in range(len(self.order))]


def test_one_tenant_is_served_first_come_first_served_behind_what_was_given_back() -> None:
    world = World()
    for name in "abc":
        world.put(name)
    world.put("x", given_back=True)
    world.put("y", given_back=True)
    assert world.all() == ["x", "y", "a", "b", "c"]
    assert world.order.head() is None


def test_tenants_take_turns_by_what_they_were_served() -> None:
    world = World()
    for number in range(4):
        world.put(f"a{number}", "a", tokens=100)
    for number in range(4):
        world.put(f"b{number}", "b", tokens=50)
    assert world.all() == ["a0", "b0", "b1", "a1", "b2", "b3", "a2", "a3"]


def test_what_an_answer_cost_counts_too() -> None:
    world = World()
    for number in range(3):
        world.put(f"a{number}", "a")
        world.put(f"b{number}", "b")
    first = world.serve()
    assert first.item == "a0"
    first.account.charge(1000)
    assert world.all() == ["b0", "b1", "b2", "a1", "a2"]


def test_weights() -> None:
    world = World(gold=3.0)
    for number in range(400):
        world.put(f"g{number}", "gold", tokens=10)
        world.put(f"o{number}", "other", tokens=10)
    served = Counter(world.serve().account.name for _ in range(400))
    assert served["gold"] == pytest.approx(300, abs=2)


def test_who_comes_back_is_owed_nothing() -> None:
    world = World()
    world.put("early", "b")
    world.serve()
    for number in range(100):
        world.put(f"a{number}", "a", tokens=100)
    for _ in range(50):
        world.serve()
    for number in range(50):
        world.put(f"b{number}", "b", tokens=100)
    served = Counter(world.serve().account.name for _ in range(40))
    assert served == {"a": 20, "b": 20}


def test_nor_is_who_comes_when_nobody_waits() -> None:
    world = World()
    for number in range(10):
        world.put(f"a{number}", "a", tokens=100)
    world.all()
    for number in range(10):
        world.put(f"b{number}", "b", tokens=100)
        world.put(f"A{number}", "a", tokens=100)
    assert Counter(world.serve().account.name for _ in range(10)) == {"a": 5, "b": 5}


def test_priorities_go_first_until_others_have_waited_long() -> None:
    world = World()
    world.put("late", priority=2)  # at 1
    world.put("urgent", priority=-1)
    world.put("usual")
    world.put("urgent again", priority=-1)
    assert world.all() == ["urgent", "urgent again", "usual", "late"]
    world.put("late", priority=2)  # has the time that one of priority 0 has 20 s later
    world.now_s += 18.0
    world.put("before")
    world.now_s += 1.0
    world.put("after")
    assert world.all() == ["before", "late", "after"]


def test_the_lowest_is_served_under_a_flood_of_urgent_ones() -> None:
    world = World()
    for number in range(20):
        world.put(f"u{number}", "a", priority=-100)
    world.put("low", "b", priority=100)
    served = []
    while not served or served[-1] != "low":
        world.put("u", "a", priority=-100)
        served.append(world.serve().item)
    assert world.now_s < 200 * STEP_S + 100


def test_removed_ones_are_not_served() -> None:
    world = World()
    kept = [world.put(f"k{number}", f"t{number % 3}") for number in range(9)]
    gone = [world.put(f"g{number}", f"t{number % 5}", number % 2) for number in range(50)]
    back = world.put("back", given_back=True)
    for waiting in (*gone, back):
        world.order.remove(waiting)
    assert sorted(world.all()) == [waiting.item for waiting in kept]


def test_put_back_goes_before_its_equals() -> None:
    world = World()
    first, second = world.put("a"), world.put("b")
    world.put("c")
    for waiting in (first, second):
        world.order.remove(waiting)
    for waiting in (second, first):
        world.order.put_back(waiting)
    assert world.all() == ["a", "b", "c"]


def test_tokens_ahead() -> None:
    world = World(gold=3.0)
    world.put("g", "gold", tokens=300)
    world.put("o", "other", tokens=100)
    world.put("u", "other", -1, tokens=7)
    world.put("x", "other", tokens=5, given_back=True)
    order, find = world.order, world.tenants.find
    assert order.tokens_ahead(None, -2) == 5
    assert order.tokens_ahead(find("nobody"), 0) == 5 + 7
    assert order.tokens_ahead(find("gold"), 0) == 5 + 7 + 400
    assert order.tokens_ahead(find("other"), 0) == 5 + 7 + 400
    assert order.tokens_ahead(find("other"), 1) == 412


def test_idle_tenants_are_forgotten_and_owe_nothing_by_it() -> None:
    world = World()
    for number in range(3 * MAX_IDLE):
        world.put("x", f"t{number}")
        world.serve()
    assert len(world.tenants) <= MAX_IDLE + 1
    # Whoever has a request is known.
    world.put("x", "debtor", tokens=10)
    running = world.order.head()
    assert running is not None
    world.order.remove(running)
    for number in range(3 * MAX_IDLE):
        world.put("x", f"u{number}")
        world.serve()
    assert world.tenants.find("debtor") is running.account


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    step = st.tuples(
        st.sampled_from(["put", "put", "put", "serve", "serve", "remove", "back", "charge"]),
        st.integers(0, 4),
        st.integers(-2, 2),
        st.integers(1, 50),
    )
    return draw(st.lists(step, max_size=80))


@settings(max_examples=100, deadline=None)
@given(histories())
def test_whatever_happens_nothing_is_lost_and_the_rule_holds(history: list[tuple[str, int, int, int]]) -> None:
    world = World(t0=3.0)
    waiting: list[Waiting[str]] = []
    for number, (what, tenant, priority, tokens) in enumerate(history):
        if what == "put":
            waiting.append(world.put(str(number), f"t{tenant}", priority, tokens))
        elif what == "back":
            waiting.append(world.put(str(number), f"t{tenant}", priority, tokens, given_back=True))
        elif what == "remove" and waiting:
            gone = waiting.pop(tenant % len(waiting))
            world.order.remove(gone)
            world.tenants.close(gone.account)
        elif what == "charge" and waiting:
            waiting[tenant % len(waiting)].account.charge(tokens)
        elif what == "serve" and waiting:
            head = world.order.head()
            assert head is by_the_book(waiting, world)
            waiting.remove(world.serve())
        assert len(world.order) == len(waiting)
        assert world.order.num_tokens == sum(item.num_tokens for item in waiting)
        for account in {item.account for item in waiting}:
            assert account.num_waiting == sum(item.account is account for item in waiting)
    assert sorted(world.all()) == sorted(item.item for item in waiting)
    assert not world.order._levels


def by_the_book(waiting: list[Waiting[str]], world: World) -> Waiting[str]:
    """The rule, told by looking at all."""
    given_back = [item for item in waiting if item.flow is None]
    if given_back:
        return min(given_back, key=lambda item: item.number)
    heads = []
    for priority in {item.priority for item in waiting}:
        level = [item for item in waiting if item.priority == priority]
        first = {item.account: item for item in sorted(level, key=lambda item: -item.number)}
        heads.append(min(first.values(), key=lambda item: (item.account.counter, item.number)))
    return min(heads, key=lambda item: (item.priority * STEP_S + item.arrived_s, item.number))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.integers(0, 1000))
def test_backlogged_tenants_differ_by_little(weights: list[int], seed: int) -> None:
    """Two tenants that always wait differ, over their weights, by at most two requests' tokens."""
    rng = random.Random(seed)
    world = World(**{f"t{index}": weight / 10 for index, weight in enumerate(weights)})
    served = dict.fromkeys(range(len(weights)), 0.0)
    for index in served:
        for _ in range(2):
            world.put("x", f"t{index}", tokens=rng.randint(1, 20))
    for _ in range(300):
        head = world.serve()
        index = int(head.account.name[1:])
        served[index] += head.num_tokens
        world.put("x", head.account.name, tokens=rng.randint(1, 20))
    shares = [tokens / (weights[index] / 10) for index, tokens in served.items()]
    assert max(shares) - min(shares) <= 2 * 20 / (min(weights) / 10)


def test_who_comes_and_goes_while_others_are_not_served_leaves_nothing() -> None:
    world = World()
    world.put("patient", "p", priority=100)
    for number in range(5 * MAX_IDLE):
        gone = world.put("x", f"t{number}")
        world.order.remove(gone)
        world.tenants.close(gone.account)
    assert len(world.tenants._least) <= MAX_IDLE + 4
    assert len(world.tenants) <= MAX_IDLE + 2
    assert world.all() == ["patient"]
