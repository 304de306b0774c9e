"""Calls and answers over each backend, compared bit for bit with the objects that were sent."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.m2n_ends import next_answer
from tests.support.m2n import BACKENDS, DTYPES, SHAPE, Channel, a_call, an_answer, assert_same, channel
from transport.m2n import Answer, Arrived, Call, Combine, Link, Status, waiter

pytestmark = pytest.mark.unit


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("combine", list(Combine))
def test_a_call_and_its_answer_are_the_same_at_the_other_end(
    backend: str, dtype: torch.dtype, combine: Combine
) -> None:
    shape = dataclasses.replace(SHAPE, dtype=dtype, hidden_size=35)
    with channel(backend, shape) as pair:
        link = pair.links[0]
        for ticket, num_rows in enumerate((1, 0, shape.max_rows, 3)):
            call = a_call(ticket, shape, num_rows=num_rows, combine=combine, num_choices=3)
            link.send(call)
            (arrived,) = pair.arrived()
            assert_same(arrived.call, call)
            pair.listener.answer(arrived, an_answer(arrived.call))
            assert_same(next_answer(link, pair.maker), an_answer(call))
        assert link.num_free == shape.num_slots


@pytest.mark.parametrize("status", [Status.NOT_HELD, Status.FAILED])
def test_an_answer_that_says_why_not_has_no_rows(backend: str, status: Status) -> None:
    with channel(backend) as pair:
        call = a_call(1, combine=Combine.SUMS)
        pair.links[0].send(call)
        (arrived,) = pair.arrived()
        answer = Answer(ticket=1, attempt=0, status=status, rows_RC=torch.empty(0, SHAPE.hidden_size))
        pair.listener.answer(arrived, answer)
        assert_same(next_answer(pair.links[0], pair.maker), answer)


def test_full_slots_are_answered_in_another_order_and_free_again(backend: str) -> None:
    with channel(backend) as pair:
        link = pair.links[0]
        for turn in range(20):
            calls = [a_call(turn * 10 + i, num_rows=i) for i in range(SHAPE.num_slots)]
            for call in calls:
                link.send(call)
            assert link.num_free == 0
            with pytest.raises(ValueError, match="calls are out"):
                link.send(a_call(turn * 10 + 9))
            arrived = pair.arrived(SHAPE.num_slots)
            for each in reversed(arrived):
                pair.listener.answer(each, an_answer(each.call))
            for call in reversed(calls):
                assert_same(next_answer(link, pair.maker), an_answer(call))
            assert link.num_free == SHAPE.num_slots


def test_an_answer_stays_while_its_successor_is_sent_and_answered(backend: str) -> None:
    with channel(backend, dataclasses.replace(SHAPE, num_slots=1)) as pair:
        link = pair.links[0]
        link.send(a_call(1))
        (arrived,) = pair.arrived()
        pair.listener.answer(arrived, an_answer(arrived.call))
        first = next_answer(link, pair.maker)
        link.send(a_call(2))
        (arrived,) = pair.arrived()
        assert_same(arrived.call, a_call(2))
        pair.listener.answer(arrived, an_answer(arrived.call))
        assert_same(first, an_answer(a_call(1)))
        assert_same(next_answer(link, pair.maker), an_answer(a_call(2)))


WRONG_CALLS: dict[str, dict[str, object]] = {
    "rows_TC": {"rows_TC": torch.zeros(SHAPE.max_rows + 1, SHAPE.hidden_size, dtype=SHAPE.dtype)},
    "rows_TC: .* torch.float32": {"rows_TC": torch.zeros(3, SHAPE.hidden_size)},
    "rows_A: 10": {"rows_A": torch.zeros(10, dtype=torch.int32)},
    "experts_A": {"experts_A": torch.zeros(6, dtype=torch.int64)},
    "weights_A": {"weights_A": torch.zeros(5)},
}


@pytest.mark.parametrize("match", WRONG_CALLS)
def test_a_call_that_does_not_fit_is_refused_and_takes_no_slot(backend: str, match: str) -> None:
    with channel(backend) as pair:
        with pytest.raises(ValueError, match=match):
            pair.links[0].send(msgspec.structs.replace(a_call(1, combine=Combine.SUMS), **WRONG_CALLS[match]))  # type: ignore[arg-type]
        assert pair.links[0].num_free == SHAPE.num_slots


def test_an_answer_that_does_not_fit_is_refused(backend: str) -> None:
    with channel(backend) as pair:
        pair.links[0].send(a_call(1))
        (arrived,) = pair.arrived()
        right = an_answer(arrived.call)
        for wrong in (
            msgspec.structs.replace(right, rows_RC=right.rows_RC[:2]),
            msgspec.structs.replace(right, rows_RC=right.rows_RC.float()),
            msgspec.structs.replace(right, ticket=2),
            msgspec.structs.replace(right, status=Status.FAILED),
        ):
            with pytest.raises(ValueError, match=r"rows_RC|ticket"):
                pair.listener.answer(arrived, wrong)
        pair.listener.answer(arrived, right)
        assert_same(next_answer(pair.links[0], pair.maker), right)


def test_a_second_answer_is_not_sent(backend: str) -> None:
    with channel(backend) as pair:
        pair.links[0].send(a_call(1))
        (arrived,) = pair.arrived()
        pair.listener.answer(arrived, an_answer(arrived.call))
        pair.listener.answer(arrived, an_answer(arrived.call))
        next_answer(pair.links[0], pair.maker)
        pair.maker.wait(0.0)
        assert pair.links[0].receive() is None


@pytest.mark.parametrize("spin_s", [0.0, 100e-6], ids=["asleep", "spinning"])
def test_both_waits_end_with_a_message(backend: str, spin_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiter, "MIN_SPIN_S", spin_s)
    monkeypatch.setattr(waiter, "MAX_SPIN_S", spin_s)
    with channel(backend, num_links=2) as pair:
        num_calls = 200

        def serve() -> None:
            left = num_calls
            while left:
                pair.listener.wait(60.0)
                for arrived in pair.listener.poll():
                    pair.listener.answer(arrived, an_answer(arrived.call))
                    left -= 1

        node = threading.Thread(target=serve)
        node.start()
        for ticket in range(num_calls):
            link = pair.links[ticket % 2]
            link.send(a_call(ticket))
            while (answer := link.receive()) is None:
                pair.maker.wait(60.0)
            assert answer.ticket == ticket
        node.join()


def test_wake_ends_a_wait_in_progress_and_the_next_one(backend: str) -> None:
    with channel(backend) as pair:
        pair.listener.wake()
        pair.listener.poll()
        pair.listener.wait(3600.0)
        waits = threading.Thread(target=pair.listener.wait, args=(3600.0,))
        waits.start()
        pair.listener.wake()
        waits.join()
        pair.listener.wait(0.0)
    pair.listener.wake()  # nothing happens where it is closed


Step = tuple[str, int, int, Combine]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["send", "send", "poll", "answer", "answer", "receive"]),
        st.integers(0, 2),
        st.integers(0, SHAPE.max_rows),
        st.sampled_from(list(Combine)),
    ),
    max_size=60,
)


@pytest.fixture(scope="module", params=BACKENDS)
def three_links(request: pytest.FixtureRequest) -> Iterator[Channel]:
    with channel(str(request.param), num_links=3) as pair:
        yield pair


@given(steps=STEPS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_interleaving_on_several_links_gives_what_was_sent(three_links: Channel, steps: list[Step]) -> None:
    """The reference: calls and answers that are kept as objects."""
    pair = three_links
    out: dict[Link, dict[int, Call]] = {link: {} for link in pair.links}
    waiting: list[Arrived] = []
    at_node: set[int] = set()
    answered: set[int] = set()

    def poll() -> None:
        for arrived in pair.listener.poll():
            call = next(calls[arrived.call.ticket] for calls in out.values() if arrived.call.ticket in calls)
            assert_same(arrived.call, call)
            assert call.ticket not in at_node
            at_node.add(call.ticket)
            waiting.append(arrived)

    def receive(link: Link) -> None:
        answer = link.receive()
        if answer is not None:
            assert answer.ticket in answered
            assert_same(answer, an_answer(out[link].pop(answer.ticket)))

    for number, (what, which, num_rows, combine) in enumerate(steps):
        link = pair.links[which]
        if what == "send" and link.num_free:
            ticket = 1000 + number
            call = out[link][ticket] = a_call(ticket, num_rows=num_rows, combine=combine, num_choices=1 + which)
            link.send(call)
        elif what == "poll":
            poll()
        elif what == "answer" and waiting:
            arrived = waiting.pop(num_rows % len(waiting))
            assert_same(arrived.call, a_call(arrived.call.ticket, num_rows=arrived.call.rows_TC.shape[0],
                                             combine=arrived.call.combine, num_choices=1 + arrived.sender))  # fmt: skip
            answered.add(arrived.call.ticket)
            pair.listener.answer(arrived, an_answer(arrived.call))
        elif what == "receive":
            receive(link)
        assert link.num_free == SHAPE.num_slots - len(out[link])
    while any(out.values()):
        poll()
        for arrived in waiting:
            answered.add(arrived.call.ticket)
            pair.listener.answer(arrived, an_answer(arrived.call))
        waiting.clear()
        pair.maker.wait(0.01)
        for link in pair.links:
            receive(link)
