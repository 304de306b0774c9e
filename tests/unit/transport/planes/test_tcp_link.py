"""Frames of the TCP plane: bad ones, ones that arrive in pieces, and peers that stop within one."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from anabranch.errors import (
    DeadlineExceeded,
    FrameTooLarge,
    MalformedMessage,
)
from tests.support.planes import Recorder, payload_of
from tests.support.waiting import WAIT_S, eventually
from transport.planes import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    handshake,
    stall,
    tcp,
)
from transport.planes.tcp import TcpPlane
from transport.planes.tcp_link import MAGIC, PREFIX, VERSION

pytestmark = pytest.mark.unit


def raw_connection(plane: TcpPlane) -> socket.socket:
    """A TCP link that knows the token and is driven by hand."""
    sock, _ = handshake.dial("tcp", tcp.KIND, plane.address, handshake.Introduction(name="raw"), 5.0)
    sock.setblocking(True)
    sock.settimeout(WAIT_S)
    return sock


def prefix(*, magic: bytes = MAGIC, version: int = VERSION, flags: int = 0, header_bytes: int = 1,
           reserved: int = 0, payload_bytes: int = 0) -> bytes:  # fmt: skip
    return PREFIX.pack(magic, version, flags, header_bytes, reserved, payload_bytes)


BAD_FRAMES = {
    "not the magic": prefix(magic=b"XX"),
    "another version": prefix(version=2),
    "flags": prefix(flags=1),
    "reserved bits": prefix(reserved=1),
    "header too long": prefix(header_bytes=MAX_HEADER_BYTES + 1),
    "payload too long": prefix(payload_bytes=MAX_PAYLOAD_BYTES + 1),
    "payload absurd": prefix(payload_bytes=2**64 - 1),
    "garbage": bytes(range(100)),
}


@pytest.mark.parametrize("frame", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_tcp_refuses_a_bad_frame_before_anything_is_allocated(frame: bytes) -> None:
    recorder = Recorder()
    plane = TcpPlane(recorder)
    with raw_connection(plane) as sock:
        sock.sendall(frame)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    eventually(lambda: len(recorder.lost) == 1)
    assert isinstance(recorder.lost[0][1], FrameTooLarge | MalformedMessage)
    assert recorder.links == []  # the handler never saw a header
    with raw_connection(plane) as sock:
        sock.sendall(prefix(header_bytes=2, payload_bytes=3) + b"hi" + b"abc")
        eventually(lambda: recorder.messages == [(b"hi", b"abc")])
    plane.close()


def test_tcp_takes_messages_cut_at_every_byte() -> None:
    recorder = Recorder()
    plane = TcpPlane(recorder)
    stream = b"".join(
        prefix(header_bytes=len(header), payload_bytes=len(payload)) + header + payload
        for header, payload in [(b"a", b""), (b"bb", b"12345"), (b"", b"x"), (b"c", b"")]
    )
    with raw_connection(plane) as sock:
        for byte in stream:
            sock.sendall(bytes([byte]))
        eventually(lambda: len(recorder.messages) == 4)
    assert recorder.messages == [(b"a", b""), (b"bb", b"12345"), (b"", b"x"), (b"c", b"")]
    plane.close()


CUT_SHORT = {
    "first byte": b"A",
    "prefix": prefix(header_bytes=9)[:10],
    "header": prefix(header_bytes=9),
    "payload": prefix(header_bytes=1, payload_bytes=1000) + b"h" + b"x" * 10,
}


@pytest.mark.parametrize("sent", CUT_SHORT.values(), ids=CUT_SHORT.keys())
def test_tcp_drops_a_peer_that_stalls_within_a_message(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "STALL_TIMEOUT_S", 0.1)
    recorder = Recorder()
    plane = TcpPlane(recorder)
    with raw_connection(plane) as sock:
        sock.sendall(sent)
        eventually(lambda: len(recorder.lost) == 1)
    assert isinstance(recorder.lost[0][1], DeadlineExceeded)
    plane.close()


def test_tcp_lets_a_peer_be_silent_between_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "STALL_TIMEOUT_S", 0.05)
    recorder = Recorder()
    plane = TcpPlane(recorder)
    with raw_connection(plane) as sock:
        sock.sendall(prefix() + b"1")
        eventually(lambda: len(recorder.messages) == 1)
        threading.Event().wait(0.3)
        sock.sendall(prefix() + b"2")
        eventually(lambda: len(recorder.messages) == 2)
    assert recorder.messages == [(b"1", b""), (b"2", b"")]
    plane.close()


def test_tcp_fails_what_a_peer_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "STALL_TIMEOUT_S", 0.1)
    monkeypatch.setattr(stall, "MIN_BYTES_PER_S", 1 << 40)
    recorder = Recorder()
    plane = TcpPlane(recorder)
    with raw_connection(plane) as sock:
        sock.sendall(prefix() + b"1")
        eventually(lambda: len(recorder.links) == 1)
        future = recorder.links[0].send(b"x", payload_of(64 << 20))
        with pytest.raises(DeadlineExceeded):
            future.result(WAIT_S)
    plane.close()
