"""Rows that go to FFN nodes: each is answered once, by whoever can, or its ticket fails by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch

import attn_nodes.remote_ffn
from anabranch.errors import FfnUnavailable
from anabranch.kernels.combine import combine_slots
from anabranch.model.ffn_half import FfnInput
from attn_nodes.part import Ticket
from attn_nodes.remote_ffn import RemoteFfn
from tests.support.waiting import eventually
from tests.unit.attn_nodes.scripted_nodes import ScriptedLinks, ScriptedNode, expert_row, placement
from transport.m2n.messages import Combine, Status

pytestmark = pytest.mark.unit

HIDDEN = 8
DENSE, SPARSE = 0, 1
NUM_EXPERTS = 4


class Clock:
    """Goes on when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class World:
    """A rank and scripted nodes."""

    def __init__(self, clock: Clock, nodes: list[ScriptedNode], combine: Combine = Combine.SLOTS) -> None:
        self.clock = clock
        self.nodes = nodes
        self.version = 1
        self.ffn = RemoteFfn(ScriptedLinks(nodes), combine=combine, ffn_timeout_s=5.0, ffn_unavailable_s=30.0)
        self.ffn.update(placement(1, *nodes))
        self.link()

    def link(self) -> None:
        """Wait until every node that can be reached is linked."""

        def linked() -> bool:
            self.ffn.poll()
            known = self.ffn._nodes.values()
            nodes = {node.name: node for node in self.nodes}
            return all(node.link is not None or not nodes[node.name].reachable for node in known)

        eventually(linked, "links to all nodes")

    def publish(self, *nodes: ScriptedNode) -> None:
        self.version += 1
        self.ffn.update(placement(self.version, *nodes))
        self.link()

    def answer_all(self) -> None:
        """Let every node answer what it has, until nothing is out."""
        while any(node.calls for node in self.nodes):
            for node in self.nodes:
                for link, call in node.calls:
                    node.answer(link, call)
            self.ffn.poll()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(attn_nodes.remote_ffn, "awake_s", found)
    return found


@pytest.fixture
def world(clock: Clock) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(nodes: list[ScriptedNode], combine: Combine = Combine.SLOTS) -> World:
        made.append(World(clock, nodes, combine))
        return made[-1]

    yield make
    for each in made:
        each.ffn.close()


def node(name: str, *experts: int, dense: bool = True) -> ScriptedNode:
    return ScriptedNode(name, [(0,) if dense else (), experts])


def rows(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((num_rows, HIDDEN), generator=torch.Generator().manual_seed(seed))


def sparse(num_rows: int, num_choices: int = 2, seed: int = 0) -> FfnInput:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand((num_rows, NUM_EXPERTS), generator=generator)
    weights, experts = scores.topk(num_choices, dim=-1)
    return FfnInput(rows(num_rows, seed), weights, experts)


def expected(layer: int, given: FfnInput) -> torch.Tensor:
    normed_TC, weights_TS, experts_TS, _ = given
    if experts_TS is None or not normed_TC.numel():
        return expert_row(normed_TC, layer, 0)
    assert weights_TS is not None
    answers = torch.stack(
        [
            torch.stack([expert_row(normed_TC[t], layer, e) for e in chosen])
            for t, chosen in enumerate(experts_TS.tolist())
        ]
    )
    return combine_slots(answers, weights_TS)


def dense(num_rows: int, seed: int = 0) -> FfnInput:
    return FfnInput(rows(num_rows, seed), None, None)


def check(ticket: Ticket, layer: int, given: FfnInput) -> None:
    assert ticket.done
    assert torch.equal(ticket.result(), expected(layer, given))


def test_a_dense_layers_rows_go_to_the_node_with_the_least_work(world) -> None:
    first, second = node("ffn-0"), node("ffn-1")
    here = world([first, second])
    tickets = [here.ffn.dispatch(1, lane, DENSE, dense(3, lane)) for lane in range(2)]
    assert [len(each.calls) for each in (first, second)] == [1, 1]
    here.answer_all()
    for lane, ticket in enumerate(tickets):
        check(ticket, DENSE, dense(3, lane))


def test_a_node_is_sent_each_row_once_however_many_of_its_experts_it_chose(world) -> None:
    both, other = node("ffn-0", 0, 1, 2), node("ffn-1", 3)
    here = world([both, other])
    given = FfnInput(rows(3), torch.rand(3, 3), torch.tensor([[0, 1, 2], [2, 3, 1], [3, 0, 1]]))
    ticket = here.ffn.dispatch(1, 0, SPARSE, given)
    ((_, call),) = both.calls
    assert call.rows_TC.shape[0] == 3
    assert call.rows_A.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert call.experts_A.tolist() == [0, 1, 2, 2, 1, 0, 1]
    ((_, call),) = other.calls
    assert torch.equal(call.rows_TC, given.normed_TC[1:])
    here.answer_all()
    check(ticket, SPARSE, given)


def test_no_rows_need_no_node(world) -> None:
    here = world([node("ffn-0")])
    ticket = here.ffn.dispatch(1, 0, DENSE, dense(0))
    assert ticket.done
    assert ticket.result().shape == (0, HIDDEN)
    ticket = here.ffn.dispatch(1, 0, SPARSE, sparse(0))
    assert ticket.result().shape == (0, HIDDEN)


def test_sums_come_in_float32_and_are_added_in_one_order(world) -> None:
    nodes = [node("ffn-0", 0, 2), node("ffn-1", 1, 3)]
    here = world(nodes, Combine.SUMS)
    given = sparse(5, 3)
    results = []
    for order in ([0, 1], [1, 0]):
        ticket = here.ffn.dispatch(1, 0, SPARSE, given)
        for index in order:
            for link, call in nodes[index].calls:
                nodes[index].answer(link, call)
            here.ffn.poll()
        results.append(ticket.result())
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], expected(SPARSE, given))


def test_rows_of_a_lost_node_go_to_a_replica(world) -> None:
    first, second = node("ffn-0", 0, 1, 2, 3), node("ffn-1", 0, 1, 2, 3)
    here = world([first, second])
    given = sparse(6)
    ticket = here.ffn.dispatch(1, 0, SPARSE, given)
    lost, left = (first, second) if first.calls else (second, first)
    lost.reachable = False
    lost.lose()
    here.ffn.poll()
    assert len(left.calls) >= 1
    here.answer_all()
    check(ticket, SPARSE, given)
    assert here.ffn.traffic.num_retries >= 1


def test_rows_of_a_lost_node_are_shared_out_among_those_that_hold_its_experts(world) -> None:
    lost = node("ffn-0", 0, 1, 2, 3)
    here = world([lost])
    given = sparse(6, 3)
    ticket = here.ffn.dispatch(1, 0, SPARSE, given)
    left = [node("ffn-1", 0, 2), node("ffn-2", 1, 3)]
    here.nodes.extend(left)
    here.ffn._links.nodes |= {each.name: each for each in left}  # type: ignore[attr-defined]
    here.publish(*left)
    here.ffn.poll()
    assert all(each.calls for each in left)
    here.answer_all()
    check(ticket, SPARSE, given)


def test_a_silent_node_is_given_up_and_what_it_says_later_is_seen_by_nobody(world, clock) -> None:
    silent, other = node("ffn-0"), node("ffn-1")
    here = world([silent, other])
    given = dense(2)
    ticket = here.ffn.dispatch(1, 0, DENSE, given)
    if not silent.calls:
        silent, other = other, silent
    (link, call) = silent.calls[0]
    silent.reachable = False
    clock.now_s += 5.1
    here.ffn.poll()
    assert link.closed
    here.answer_all()
    check(ticket, DENSE, given)
    link.calls.append(call)
    silent.answer(link, call, spoil=True)
    here.ffn.poll()
    check(ticket, DENSE, given)


def test_a_late_call_is_sent_to_a_replica_too_and_the_first_answer_counts(world, clock) -> None:
    nodes = [node("ffn-0"), node("ffn-1")]
    here = world(nodes)
    given = dense(2)
    ticket = here.ffn.dispatch(1, 0, DENSE, given)
    late = next(each for each in nodes if each.calls)
    other = next(each for each in nodes if not each.calls)
    clock.now_s += attn_nodes.remote_ffn.LATE_S * 1.1
    here.ffn.poll()
    assert here.ffn.traffic.num_second == 1
    here.ffn.poll()
    assert here.ffn.traffic.num_second == 1
    ((link, call),) = other.calls
    other.answer(link, call)
    here.ffn.poll()
    check(ticket, DENSE, given)
    ((link, call),) = late.calls
    late.answer(link, call, spoil=True)
    here.ffn.poll()
    check(ticket, DENSE, given)
    assert not any(known.calls for known in here.ffn._nodes.values())


@pytest.mark.parametrize("how", ["failed", "malformed", "not held", "no number"])
def test_what_a_node_cannot_compute_goes_to_a_replica(world, how: str) -> None:
    nodes = [node("ffn-0"), node("ffn-1")]
    here = world(nodes)
    given = dense(2)
    ticket = here.ffn.dispatch(1, 0, DENSE, given)
    refuser = next(each for each in nodes if each.calls)
    ((link, call),) = refuser.calls
    status = {"failed": Status.FAILED, "malformed": Status.MALFORMED, "not held": Status.NOT_HELD}
    refuser.answer(link, call, status.get(how, Status.OK), spoil=how == "no number")
    here.ffn.poll()
    assert not refuser.calls
    here.answer_all()
    check(ticket, DENSE, given)


def test_what_no_node_can_compute_fails_at_once_and_by_name(world) -> None:
    only = node("ffn-0", 1)
    here = world([only])
    ticket = here.ffn.dispatch(1, 0, DENSE, dense(2))
    ((link, call),) = only.calls
    only.answer(link, call, Status.FAILED)
    here.ffn.poll()
    assert ticket.done
    with pytest.raises(FfnUnavailable, match=r"layer 0, expert 0: no FFN node .* could compute it .*ffn-0: failed"):
        ticket.result()


def test_rows_that_nobody_holds_wait_and_then_fail_with_the_key_and_the_experts(world, clock) -> None:
    here = world([node("ffn-0", 0, 1, 2)])
    given = FfnInput(rows(2), torch.rand(2, 2), torch.tensor([[3, 0], [1, 3]]))
    ticket = here.ffn.dispatch(1, 0, SPARSE, given)
    here.answer_all()
    clock.now_s += 29.0
    here.ffn.poll()
    assert not ticket.done
    clock.now_s += 1.1
    here.ffn.poll()
    with pytest.raises(FfnUnavailable, match=r"ffn_unavailable_s: layer 1, expert 3: .* in 30 s"):
        ticket.result()


def test_rows_whose_time_is_over_are_not_sent_to_another_node_first(world, clock) -> None:
    nodes = [node("ffn-0"), node("ffn-1")]
    here = world(nodes)
    ticket = here.ffn.dispatch(1, 0, DENSE, dense(2))
    clock.now_s += 30.1
    here.ffn.poll()
    assert ticket.done
    with pytest.raises(FfnUnavailable, match=r"ffn_unavailable_s: layer 0, expert 0: .* no answer in 5 s"):
        ticket.result()
    assert not any(known.calls for known in here.ffn._nodes.values())


def test_rows_that_nobody_holds_go_to_who_comes_to_hold_them(world) -> None:
    only = node("ffn-0", 0, 1, 2)
    here = world([only])
    given = FfnInput(rows(2), torch.rand(2, 2), torch.tensor([[3, 0], [1, 3]]))
    ticket = here.ffn.dispatch(1, 0, SPARSE, given)
    here.answer_all()
    assert not ticket.done
    only.holding = ((0,), (0, 1, 2, 3))
    here.publish(only)
    here.ffn.poll()
    here.answer_all()
    check(ticket, SPARSE, given)


def test_a_node_that_comes_back_is_sent_what_waits(world) -> None:
    only = node("ffn-0")
    here = world([only])
    given = dense(4)
    ticket = here.ffn.dispatch(1, 0, DENSE, given)
    only.lose()
    here.ffn.poll()
    here.link()
    here.ffn.poll()
    assert len(only.links) == 2
    here.answer_all()
    check(ticket, DENSE, given)


def test_more_calls_than_slots_wait_for_room(world) -> None:
    only = node("ffn-0")
    here = world([only])
    tickets = [here.ffn.dispatch(1, 0, DENSE, dense(1, seed)) for seed in range(7)]
    assert len(only.calls) == 4
    here.answer_all()
    here.ffn.poll()
    here.answer_all()
    for seed, ticket in enumerate(tickets):
        check(ticket, DENSE, dense(1, seed))


def test_an_older_placement_is_ignored(world) -> None:
    only, gone = node("ffn-0"), node("ffn-1")
    here = world([only, gone])
    here.publish(only)
    here.ffn.update(placement(1, only, gone))
    assert list(here.ffn._nodes) == ["ffn-0"]


def test_another_incarnation_is_another_node(world) -> None:
    only = node("ffn-0")
    here = world([only])
    given = dense(3)
    ticket = here.ffn.dispatch(1, 0, DENSE, given)
    old = only.links[0]
    only.incarnation = 2
    here.publish(only)
    assert old.closed
    here.ffn.poll()
    here.answer_all()
    check(ticket, DENSE, given)


@pytest.mark.parametrize("combine", [Combine.SLOTS, Combine.SUMS])
@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_each_ticket_is_answered_right_or_fails_by_name(world, clock, combine, seed: int) -> None:
    rng = random.Random(seed)
    holders = [rng.sample(range(3), rng.randint(1, 3)) for _ in range(NUM_EXPERTS)]
    nodes = [
        node(f"ffn-{index}", *[expert for expert in range(NUM_EXPERTS) if index in holders[expert]])
        for index in range(3)
    ]
    here = world(nodes, combine)
    tickets: list[tuple[Ticket, int, FfnInput]] = []
    for turn in range(150):
        choice = rng.random()
        ready = [(each, link, call) for each in nodes for link, call in each.calls if not link.lost]
        if choice < 0.25:
            layer = rng.choice([DENSE, SPARSE])
            count = rng.randint(0, 6)
            given = dense(count, turn) if layer == DENSE else sparse(count, rng.randint(1, 4), turn)
            tickets.append((here.ffn.dispatch(turn, turn % 2, layer, given), layer, given))
        elif choice < 0.85 and ready:
            each, link, call = rng.choice(ready)
            bad = rng.random()
            if bad < 0.7:
                each.answer(link, call, twice=rng.random() < 0.1)
            elif bad < 0.8:
                each.answer(link, call, spoil=True)
            else:
                each.answer(link, call, rng.choice([Status.NOT_HELD, Status.FAILED, Status.MALFORMED]))
        elif choice < 0.9:
            rng.choice(nodes).lose()
        elif choice < 0.95:
            clock.now_s += rng.choice([0.01, 0.2, 6.0])
        else:
            here.publish(*nodes)
        here.ffn.poll()
    for _ in range(40):
        here.publish(*nodes)
        here.ffn.poll()
        here.answer_all()
    clock.now_s += 31.0
    here.ffn.poll()
    num_right = 0
    for ticket, layer, given in tickets:
        assert ticket.done
        if ticket.error is not None:
            assert isinstance(ticket.error, FfnUnavailable)
            continue
        num_right += 1
        if combine is Combine.SLOTS or layer == DENSE:
            check(ticket, layer, given)
        else:
            torch.testing.assert_close(ticket.result(), expected(layer, given))
    assert num_right > len(tickets) / 2
    assert not any(known.calls or known.num_rows for known in here.ffn._nodes.values())
