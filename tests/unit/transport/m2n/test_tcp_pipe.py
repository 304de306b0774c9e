"""Messages over a socket: cut anywhere, many at once, and peers that take nothing."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from anabranch.errors import ChecksumMismatch, MalformedMessage, PeerLost
from tests.support.m2n import SHAPE, a_call, assert_same
from tests.support.waiting import WAIT_S, eventually
from transport.m2n import Call, Combine
from transport.m2n.body import body_of, call_parts, check_body, checksum_of, view_call
from transport.m2n.ends import Terms
from transport.m2n.header import pack_call
from transport.m2n.pipe import Message
from transport.m2n.tcp_pipe import READ_AHEAD_BYTES, TcpPipe
from transport.m2n.waiter import Waiter

pytestmark = pytest.mark.unit

INCARNATION = 9
NUM_TIMES = 12_000


@dataclass(frozen=True)
class End:
    """A node's end, and the socket that is driven by hand."""

    pipe: TcpPipe
    waiter: Waiter
    sock: socket.socket

    def take(self) -> Message:
        """The next message."""
        taken: list[Message] = []

        def take() -> bool:
            self.waiter.wait(0.01)
            message = self.pipe.take()
            taken.extend([] if message is None else [message])
            return bool(taken)

        eventually(take, "a message comes")
        return taken[0]


@pytest.fixture
def end() -> Iterator[End]:
    with socket.create_server(("127.0.0.1", 0)) as door:
        sock = socket.create_connection(door.getsockname())
        mine, _ = door.accept()
    mine.setblocking(False)
    sock.settimeout(WAIT_S)
    waiter = Waiter()
    shape = dataclasses.replace(SHAPE, num_slots=2, max_rows=16 * NUM_TIMES)
    pipe = TcpPipe(mine, Terms(shape=shape, answers=True, peer="rank", peer_incarnation=INCARNATION), waiter)
    yield End(pipe, waiter, sock)
    pipe.close()
    sock.close()
    waiter.close()


def wire(call: Call) -> bytes:
    """A call's bytes."""
    body = body_of(call_parts(call, SHAPE))
    return pack_call(call, SHAPE, INCARNATION, checksum_of(body)) + b"".join(bytes(part) for part in body)


def check(message: Message, call: Call) -> None:
    check_body(message)
    assert_same(view_call(message, SHAPE), call)


def test_messages_cut_at_every_byte_are_taken_whole(end: End) -> None:
    calls = [a_call(1, num_rows=1, combine=Combine.SUMS), a_call(2, num_rows=0), a_call(3, num_rows=2)]
    taken: list[Message] = []
    for byte in b"".join(wire(call) for call in calls):
        end.sock.sendall(bytes([byte]))
        end.waiter.wait(0.0)  # it would go on until the message is whole
        message = end.pipe.take()
        if message is not None:
            check(message, calls[len(taken)])
            taken.append(message)
            end.pipe.give_back(message.slot)
    assert len(taken) == 3


def test_a_body_that_is_damaged_on_its_way_is_noticed_however_it_is_cut(end: End) -> None:
    data = bytearray(wire(a_call(1, num_rows=16, combine=Combine.SUMS)))
    data[200] ^= 1
    for pieces in ([data], [data[:150], data[150:]], [data[:300], data[300:900], data[900:]]):
        for piece in pieces:
            end.sock.sendall(piece)
            end.waiter.wait(0.0)
            message = end.pipe.take()
        assert message is not None
        with pytest.raises(ChecksumMismatch):
            check_body(message)
        end.pipe.give_back(message.slot)


def test_messages_that_come_at_once_are_taken_one_by_one(end: End) -> None:
    calls = [a_call(ticket, num_rows=ticket % 17, combine=Combine.SLOTS) for ticket in range(100)]
    data = b"".join(wire(call) for call in calls)
    assert len(data) > 2 * READ_AHEAD_BYTES
    end.sock.sendall(data)
    for call in calls:
        message = end.take()
        check(message, call)
        end.pipe.give_back(message.slot)


def test_a_message_without_a_buffer_is_refused_by_name(end: End) -> None:
    end.sock.sendall(b"".join(wire(a_call(ticket)) for ticket in range(3)))
    end.take()
    end.take()
    with pytest.raises(MalformedMessage, match="slots"):
        end.take()


def test_what_a_peer_does_not_read_is_bounded_and_then_ends_the_link(end: End) -> None:
    large = a_call(1, num_rows=16)
    rows = large.rows_TC.repeat(NUM_TIMES, 1)  # 13.8 MB
    end.pipe.send(0, lambda checksum: wire(large)[:128], [rows])
    end.pipe.send(1, lambda checksum: wire(large)[:128], [rows])
    with pytest.raises(PeerLost, match="asks for more than it takes"):
        end.pipe.send(0, lambda checksum: wire(large)[:128], [rows])


def test_what_is_left_goes_out_whole_while_waiting(end: End) -> None:
    large = a_call(1, num_rows=16)
    rows = large.rows_TC.repeat(NUM_TIMES, 1)
    header = wire(large)[:128]
    for slot in range(2):
        end.pipe.send(slot, lambda checksum: header, [rows])
    expected = (header + bytes(body_of([rows])[0])) * 2
    received = bytearray()
    while len(received) < len(expected):
        end.waiter.wait(0.0)
        received += end.sock.recv(1 << 20)
    assert received == expected
    end.pipe.send(0, lambda checksum: header, [rows[:1]])
    assert end.sock.recv(1 << 20)[:128] == header


@pytest.mark.parametrize("num_bytes", [0, 50, 128, 140])
def test_a_peer_that_ends_within_a_message_is_lost(end: End, num_bytes: int) -> None:
    end.sock.sendall(wire(a_call(1))[:num_bytes])
    end.sock.close()
    with pytest.raises(PeerLost, match="rank: it closed the link"):
        end.take()
    with pytest.raises(PeerLost):
        end.pipe.send(0, lambda checksum: b"", [])
