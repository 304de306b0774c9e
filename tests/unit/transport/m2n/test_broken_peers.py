"""Peers that send what none sends: refused by name, and the other links go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from anabranch.errors import ChecksumMismatch, MalformedMessage, PeerLost
from benchmarks.m2n_ends import next_answer
from tests.support.m2n import (
    BACKENDS,
    SHAPE,
    Channel,
    a_call,
    altered,
    an_answer,
    assert_same,
    channel,
    compute,
)
from tests.support.waiting import eventually
from transport.m2n import Answer, Arrived, Combine, Link, Status
from transport.m2n.body import call_parts
from transport.m2n.header import Header, pack_answer, pack_call
from transport.m2n.link import PipeLink
from transport.m2n.served import Pending

pytestmark = pytest.mark.unit


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def check_link(pair: Channel, link: Link, ticket: int = 500) -> None:
    """A link that works."""
    link.send(a_call(ticket))
    (arrived,) = pair.arrived()
    pair.listener.answer(arrived, an_answer(arrived.call))
    assert_same(next_answer(link, pair.maker), an_answer(a_call(ticket)))


def send_answer(arrived: Arrived, change: Callable[[Header], Header], checksum: int | None = None) -> None:
    """Answer as if the call had been another one, or with another checksum."""
    pending = arrived.token
    assert isinstance(pending, Pending)
    link, header = pending.link, change(pending.header)
    rows_RC = compute(arrived.call)
    answer = Answer(ticket=header.ticket, attempt=header.attempt, status=Status.OK, rows_RC=rows_RC)

    def pack(right: int) -> bytes:
        return pack_answer(answer, header, SHAPE, link._incarnation, right if checksum is None else checksum)

    link._pipe.send(pending.slot, pack, [rows_RC])


WRONG: dict[str, Callable[[Header], Header]] = {
    "ticket: 999 is not out": lambda header: header._replace(ticket=999),
    "attempt": lambda header: header._replace(attempt=1),
    "layer": lambda header: header._replace(layer=60),
    "placement": lambda header: header._replace(placement=4),
    "combine": lambda header: header._replace(combine=Combine.SLOTS),
    "num_assignments": lambda header: header._replace(num_assignments=1),
}


def receive_error(pair: Channel, link: Link) -> Exception:
    """What `receive` raises in the end."""
    errors: list[Exception] = []

    def receive() -> bool:
        pair.maker.wait(0.01)
        try:
            assert link.receive() is None
        except Exception as error:
            errors.append(error)
        return bool(errors)

    eventually(receive, "the link fails")
    return errors[0]


@pytest.mark.parametrize("match", WRONG)
def test_an_answer_to_no_call_is_refused_by_name_and_ends_the_link(backend: str, match: str) -> None:
    with channel(backend, num_links=2) as pair:
        link, other = pair.links
        link.send(a_call(1))
        (arrived,) = pair.arrived()
        send_answer(arrived, WRONG[match])
        error = receive_error(pair, link)
        assert isinstance(error, MalformedMessage) and match in str(error)
        with pytest.raises(PeerLost):
            link.send(a_call(2))
        check_link(pair, other)
        eventually(lambda: not pair.listener.poll() and pair.listener.num_links == 1, "the node drops the link")


def test_a_doubled_answer_is_refused(backend: str) -> None:
    with channel(backend) as pair:
        link = pair.links[0]
        link.send(a_call(1))
        (arrived,) = pair.arrived()
        send_answer(arrived, lambda header: header)
        send_answer(arrived, lambda header: header)
        assert next_answer(link, pair.maker).ticket == 1
        error = receive_error(pair, link)
        assert isinstance(error, MalformedMessage) and "ticket: 1" in str(error)


def test_an_answer_whose_body_is_damaged_is_refused(backend: str) -> None:
    with channel(backend) as pair:
        link = pair.links[0]
        link.send(a_call(1))
        (arrived,) = pair.arrived()
        send_answer(arrived, lambda header: header, checksum=12345)
        error = receive_error(pair, link)
        assert isinstance(error, ChecksumMismatch) and "body_checksum" in str(error)


def send_call(link: Link, ticket: int, **fields: int) -> None:
    """Send a call with other values in its header."""
    assert isinstance(link, PipeLink)
    call = a_call(ticket, combine=Combine.SUMS)
    slot = link._free.pop()
    link._out[ticket] = (call, slot)

    def pack(checksum: int) -> bytes:
        data = pack_call(call, SHAPE, link._incarnation, checksum)
        for field, value in fields.items():
            data = altered(data, field, value)
        return data

    link._pipe.send(slot, pack, call_parts(call, SHAPE))


def refusal(pair: Channel) -> Answer:
    """The answer to a call that does not show at the node."""
    answers: list[Answer] = []

    def receive() -> bool:
        assert not pair.listener.poll()
        answer = pair.links[0].receive()
        answers.extend([] if answer is None else [answer])
        return bool(answers)

    eventually(receive, "the refusal comes")
    assert answers[0].status == Status.MALFORMED
    return answers[0]


@pytest.mark.parametrize(
    "fields", [{"dtype": 0}, {"num_rows": 17}, {"hidden_size": 1}, {"body_checksum": 1}, {"num_rows": 2}], ids=str
)
def test_a_call_that_cannot_be_understood_is_answered_so(backend: str, fields: dict[str, int]) -> None:
    with channel(backend) as pair:
        link = pair.links[0]
        send_call(link, 1, **fields)
        answer = refusal(pair)
        assert answer.ticket == 1 and answer.rows_RC.shape == (0, SHAPE.hidden_size)
        check_link(pair, link)


@pytest.mark.parametrize("row", [3, -1, 2**31 - 1])
def test_an_assignment_of_a_row_that_there_is_not_is_answered_so(backend: str, row: int) -> None:
    with channel(backend) as pair:
        call = a_call(1, combine=Combine.SLOTS)
        call.rows_A[4] = row
        pair.links[0].send(call)
        refusal(pair)
        check_link(pair, pair.links[0])


@pytest.mark.parametrize("fields", [{"version": 9}, {"kind": 2}, {"incarnation": 1}, {"body_bytes": 1 << 40}], ids=str)
def test_a_broken_frame_ends_its_link_alone(backend: str, fields: dict[str, int]) -> None:
    with channel(backend, num_links=2) as pair:
        link, other = pair.links
        send_call(link, 1, **fields)
        eventually(lambda: not pair.listener.poll() and pair.listener.num_links == 1, "the link ends")
        assert isinstance(receive_error(pair, link), PeerLost)
        check_link(pair, other)


def test_a_rank_that_sends_more_than_its_slots_loses_its_link(backend: str) -> None:
    with channel(backend, num_links=2) as pair:
        link, other = pair.links
        for ticket in range(SHAPE.num_slots):
            link.send(a_call(ticket))
        assert len(pair.arrived(SHAPE.num_slots)) == SHAPE.num_slots
        assert isinstance(link, PipeLink)
        link._free[:] = [0]
        send_call(link, 100)
        eventually(lambda: not pair.listener.poll() and pair.listener.num_links == 1, "the link ends")
        check_link(pair, other)


def test_a_tensor_outlives_its_link(backend: str) -> None:
    with channel(backend) as pair:
        link = pair.links[0]
        link.send(a_call(1))
        (arrived,) = pair.arrived()
        pair.listener.answer(arrived, an_answer(arrived.call))
        answer = next_answer(link, pair.maker)
        link.send(a_call(2))
        (late,) = pair.arrived()
        link.close()
        link.close()
        assert_same(answer, an_answer(a_call(1)))
        # The node wakes and writes: to memory that nobody reads, or to a socket that nobody has.
        pair.listener.answer(late, an_answer(a_call(2)))
        assert_same(answer, an_answer(a_call(1)))
        for call in (link.receive, lambda: link.send(a_call(3))):
            with pytest.raises(PeerLost):
                call()
        eventually(lambda: not pair.listener.poll() and not pair.listener.num_links, "the node notices")
        pair.listener.answer(late, an_answer(a_call(2)))
        check_link(pair, pair.connect())
