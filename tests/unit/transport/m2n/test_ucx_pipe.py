"""Messages over UCX: peers that send more, longer or less than they may, and peers that end."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from anabranch.errors import ChecksumMismatch, MalformedMessage, PeerLost
from tests.support.m2n import REASONS, SHAPE, a_call, assert_same
from tests.support.waiting import eventually
from transport.m2n import Call
from transport.m2n.body import body_of, call_parts, check_body, checksum_of, view_call
from transport.m2n.ends import Terms
from transport.m2n.header import pack_call
from transport.m2n.pipe import Message
from transport.m2n.ucx_pipe import UcxPipe, UcxWay
from transport.m2n.waiter import Waiter
from transport.ucx.api import HOST_TRANSPORTS, UcxRequest, load, make_context, make_worker

pytestmark = [pytest.mark.unit, pytest.mark.skipif(bool(REASONS["ucx"]), reason=REASONS["ucx"])]

INCARNATION = 9
TWO_SLOTS = dataclasses.replace(SHAPE, num_slots=2, max_rows=1000)


@dataclass
class End:
    """A node's end, and the rank's, which is driven by hand."""

    pipe: UcxPipe
    waiter: Waiter
    rank: UcxWay
    sock: socket.socket
    requests: list[UcxRequest] = field(default_factory=list)
    arrays: list[object] = field(default_factory=list)  # what is sent is read where it lies

    def send(self, data: bytes) -> None:
        """Send a message from the rank."""
        array = load().Array(np.frombuffer(bytearray(data), np.uint8))
        self.arrays.append(array)
        self.requests.append(self.rank.endpoint.tag_send(array, self.rank.tag))
        self.rank.worker.progress()

    def take(self) -> Message:
        """The next message at the node; what `take` raises."""
        taken: list[Message] = []

        def take() -> bool:
            self.rank.worker.progress()
            self.waiter.wait(0.01)
            message = self.pipe.take()
            taken.extend([] if message is None else [message])
            return bool(taken)

        eventually(take, "a message comes")
        return taken[0]


@pytest.fixture
def end() -> Iterator[End]:
    mine, sock = socket.socketpair()
    mine.setblocking(False)
    waiter = Waiter()
    workers = [make_worker(make_context(HOST_TRANSPORTS)) for _ in range(2)]
    node, rank = (UcxWay(workers[i], workers[1 - i].address.tobytes(), "rank") for i in range(2))
    terms = Terms(shape=TWO_SLOTS, answers=True, peer="rank", peer_incarnation=INCARNATION)
    made = End(UcxPipe(mine, node, terms, waiter), waiter, rank, sock)
    yield made
    rank.close(made.requests)
    made.pipe.close()
    made.pipe.close()
    sock.close()
    waiter.close()


def wire(call: Call) -> bytes:
    """A call's bytes."""
    body = body_of(call_parts(call, TWO_SLOTS))
    return pack_call(call, TWO_SLOTS, INCARNATION, checksum_of(body)) + b"".join(bytes(part) for part in body)


def test_messages_short_and_long_come_in_order_and_slots_come_round(end: End) -> None:
    for ticket, num_rows in enumerate((0, 1, 1000, 3, 1000)):
        call = a_call(ticket, TWO_SLOTS, num_rows=num_rows)
        end.send(wire(call))
        message = end.take()
        check_body(message)
        assert_same(view_call(message, TWO_SLOTS), call)
        end.pipe.give_back(message.slot)


@pytest.mark.parametrize("num_rows", [1, 1000], ids=["eager", "rendezvous"])
def test_a_message_without_a_slot_is_refused_by_name(end: End, num_rows: int) -> None:
    for ticket in range(3):
        end.send(wire(a_call(ticket, TWO_SLOTS, num_rows=num_rows)))
    end.take()
    end.take()
    with pytest.raises(MalformedMessage, match="slots"):
        end.take()


def test_a_message_longer_than_its_slot_is_refused_by_name(end: End) -> None:
    end.send(wire(a_call(1, TWO_SLOTS)) + bytes(1 << 20))
    with pytest.raises(MalformedMessage, match="body_bytes"):
        end.take()


def test_a_message_shorter_than_it_says_is_noticed(end: End) -> None:
    end.send(wire(a_call(1, TWO_SLOTS))[:-8])
    with pytest.raises(ChecksumMismatch):
        check_body(end.take())


def test_what_came_before_a_peer_ended_is_taken_first(end: End) -> None:
    end.send(wire(a_call(1, TWO_SLOTS)))
    end.sock.close()
    assert end.take().header.ticket == 1
    with pytest.raises(PeerLost, match="rank: it closed the link"):
        end.take()
    with pytest.raises(PeerLost):
        end.pipe.send(0, lambda checksum: bytes(128), [])


def test_a_word_on_the_socket_that_shows_life_ends_the_link(end: End) -> None:
    end.sock.send(b"x")
    with pytest.raises(PeerLost, match="only shows that it lives"):
        end.take()


def test_a_peer_that_takes_nothing_cannot_make_buffers_grow(end: End) -> None:
    large = a_call(1, TWO_SLOTS, num_rows=1000)
    for _ in range(3):
        end.pipe.send(0, lambda checksum: wire(large)[:128], [large.rows_TC])
    with pytest.raises(PeerLost, match="asks for more than it takes"):
        end.pipe.send(0, lambda checksum: wire(large)[:128], [large.rows_TC])


def test_a_wait_sleeps_once_nothing_comes_any_more(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    for ticket in range(2):
        end.send(wire(a_call(ticket, TWO_SLOTS, num_rows=1000 * ticket)))
        end.take()
    num_calls = 0
    progress = end.pipe.progress

    def counted() -> bool:
        nonlocal num_calls
        num_calls += 1
        return progress()

    monkeypatch.setattr(end.pipe, "progress", counted)
    monkeypatch.setattr(end.waiter, "_spin_s", 0.0)
    end.waiter.wait(0.05)
    assert num_calls < 50
