"""Which calls are computed next, and which of them together."""

from __future__ import annotations

import pytest
import torch

from benchmarks.m2n_ends import make_call
from ffn_nodes.waiting_calls import WaitingCalls
from tests.support.ffn_calls import arrived
from transport.m2n.base import Arrived

pytestmark = pytest.mark.unit


def came(ticket: int, layer: int, at_s: float, sender: int = 0, experts: tuple[int, ...] = ()) -> Arrived:
    experts_TS = torch.tensor([experts]) if experts else None
    return arrived(make_call(torch.zeros(1, 4), layer=layer, ticket=ticket, experts_TS=experts_TS), sender, at_s)


def tickets(calls: list[Arrived]) -> list[int]:
    return [arrived.call.ticket for arrived in calls]


def test_the_layer_whose_oldest_call_waited_longest_is_taken_whole() -> None:
    waiting = WaitingCalls(merge_wait_s=0.0)
    for call in (came(0, 5, 3.0), came(1, 2, 1.0), came(2, 5, 4.0), came(3, 2, 5.0, sender=1), came(4, 7, 2.0)):
        waiting.add(call)
    assert len(waiting) == 5
    assert tickets(waiting.take(6.0, 2)) == [1, 3]
    assert tickets(waiting.take(6.0, 2)) == [4]
    assert tickets(waiting.take(6.0, 2)) == [0, 2]
    assert not waiting.take(6.0, 2)
    assert len(waiting) == 0


def test_a_layer_waits_for_others_until_the_time_is_over() -> None:
    waiting = WaitingCalls(merge_wait_s=0.5)
    assert waiting.ready_in_s(0.0, 9.0) == 9.0
    waiting.add(came(0, 0, 1.0))
    waiting.add(came(1, 1, 1.25))
    assert not waiting.take(1.25, 2)
    assert waiting.ready_in_s(1.25, 9.0) == 0.25
    assert waiting.ready_in_s(1.25, 0.125) == 0.125
    assert tickets(waiting.take(1.5, 2)) == [0]
    assert not waiting.take(1.5, 2)
    assert waiting.ready_in_s(2.0, 9.0) == 0.0


def test_a_layer_that_all_links_wait_for_is_taken_at_once() -> None:
    waiting = WaitingCalls(merge_wait_s=10.0)
    waiting.add(came(0, 0, 1.0, sender=0))
    waiting.add(came(1, 1, 1.1, sender=0))
    waiting.add(came(2, 1, 1.2, sender=1))
    assert tickets(waiting.take(1.3, 2)) == [1, 2]
    assert not waiting.take(1.3, 2)
    # A link was lost: nobody else can come.
    assert tickets(waiting.take(1.3, 1)) == [0]


def test_what_waiting_calls_need_is_known() -> None:
    waiting = WaitingCalls(merge_wait_s=0.0)
    waiting.add(came(0, 3, 1.0, experts=(2, 5)))
    waiting.add(came(1, 4, 1.0))
    assert waiting.name_any({(3, 5)})
    assert waiting.name_any({(3, 1), (4, 0)})
    assert not waiting.name_any({(3, 1), (2, 5), (5, 0)})
    assert not waiting.name_any(())
