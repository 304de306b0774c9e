"""Who may connect to a plane, and what becomes of those who may not."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable

import pytest

from anabranch.errors import (
    ConfigError,
    DeadlineExceeded,
)
from tests.support.planes import Pair, Recorder, endpoint_of, payload_of
from tests.support.resources import num_descriptors
from tests.support.waiting import WAIT_S, eventually
from transport.planes import (
    Plane,
    create_plane,
    handshake,
)

pytestmark = pytest.mark.unit


def kind_of(plane: Plane) -> int:
    return {"tcp": 1, "ucx": 2}[plane.name]


def hello_prefix(plane: Plane, *, magic: bytes = b"ANBP", version: int = 1, kind: int | None = None,
                 token: bytes | None = None, body_bytes: int = 0) -> bytes:  # fmt: skip
    real = endpoint_of(plane)[2]
    return handshake._PREFIX.pack(
        magic, version, kind_of(plane) if kind is None else kind, 0, real if token is None else token, body_bytes
    )


STRANGERS: dict[str, Callable[[Plane], bytes]] = {
    "http": lambda plane: b"GET / HTTP/1.1\r\n\r\n",
    "one wrong byte": lambda plane: b"X",
    "random": lambda plane: os.urandom(4096),
    "wrong token": lambda plane: hello_prefix(plane, token=bytes(16)),
    "wrong version": lambda plane: hello_prefix(plane, version=9),
    "wrong plane": lambda plane: hello_prefix(plane, kind=77),
    "huge introduction": lambda plane: hello_prefix(plane, body_bytes=0xFFFFFFFF),
    "introduction that is none": lambda plane: hello_prefix(plane, body_bytes=3) + b"\xc1\xc1\xc1",
}


@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS.keys())
def test_a_stranger_is_refused_at_once_and_the_plane_goes_on(
    network_pair: Pair, stranger: Callable[[Plane], bytes]
) -> None:
    host, port, _ = endpoint_of(network_pair.b)
    with socket.create_connection((host, port), timeout=WAIT_S) as sock:
        sock.sendall(stranger(network_pair.b))
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""
    network_pair.link.send(b"x", payload_of(100_000)).result(WAIT_S)
    eventually(lambda: len(network_pair.at_b.messages) == 1)
    assert network_pair.at_b.lost == []


def test_who_says_nothing_is_refused_in_time(network_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "HELLO_TIMEOUT_S", 0.05)
    host, port, _ = endpoint_of(network_pair.b)
    with socket.create_connection((host, port), timeout=WAIT_S) as silent:
        assert silent.recv(1) == b""


def test_a_flood_of_silent_connections_keeps_nobody_out(network_pair: Pair) -> None:
    host, port, _ = endpoint_of(network_pair.b)
    silent = [socket.create_connection((host, port), timeout=WAIT_S) for _ in range(handshake.MAX_PENDING_HELLOS + 20)]
    link = network_pair.a.connect(network_pair.b.address, 5.0)
    link.send(b"x").result(WAIT_S)
    eventually(lambda: len(network_pair.at_b.messages) == 1)
    for sock in silent:
        sock.close()


def test_a_connection_that_gives_way_while_it_says_something_leaves_no_trace_in_the_log(
    network_pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    host, port, _ = endpoint_of(network_pair.b)
    acceptor = network_pair.b._acceptor
    silent = [socket.create_connection((host, port), timeout=WAIT_S) for _ in range(handshake.MAX_PENDING_HELLOS)]
    eventually(lambda: len(acceptor._pending) == handshake.MAX_PENDING_HELLOS)
    # The loop finds all of it in one turn: a newcomer, for whom the oldest is preempted, and words of the oldest.
    go_on = threading.Event()
    network_pair.b.loop.call_soon(lambda: go_on.wait(WAIT_S) and None)
    silent.append(socket.create_connection((host, port), timeout=WAIT_S))
    for sock in silent:
        sock.sendall(b"AN")
    go_on.set()
    eventually(lambda: network_pair.b.num_refused > 0)
    network_pair.link.send(b"x").result(WAIT_S)
    for sock in silent:
        sock.close()
    eventually(lambda: not acceptor._pending)
    assert not [record for record in caplog.records if record.exc_info]
    # Each was refused, few of them were written about.
    assert network_pair.b.num_refused == len(silent)
    assert 1 <= len([r for r in caplog.records if "connection refused" in r.message]) <= 10


class NoDescriptors:
    """A listening socket whose process has no descriptors left, a few times."""

    def __init__(self, real: socket.socket, times: int) -> None:
        self._real = real
        self.times = times

    def accept(self) -> tuple[socket.socket, object]:
        self.times -= 1
        if self.times >= 0:
            raise OSError(errno.EMFILE, "Too many open files")
        return self._real.accept()

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)


def test_a_process_without_descriptors_goes_on_with_the_links_that_it_has(
    network_pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(handshake, "ACCEPT_PAUSE_S", 0.05)
    acceptor = network_pair.b._acceptor
    acceptor._listener = listener = NoDescriptors(acceptor._listener, 5)
    host, port, _ = endpoint_of(network_pair.b)
    with socket.create_connection((host, port), timeout=WAIT_S):
        eventually(lambda: listener.times < 5)
        # Nobody sleeps on the thread that moves bytes, nor is it asked about the same connection without end.
        network_pair.link.send(b"x", payload_of(100_000)).result(WAIT_S)
        eventually(lambda: listener.times < 0)
    network_pair.a.connect(network_pair.b.address, 5.0).send(b"y").result(WAIT_S)
    eventually(lambda: len(network_pair.at_b.messages) == 2)
    assert len([r for r in caplog.records if "accept failed" in r.message]) == 5


def test_a_peer_that_is_admitted_and_gone_leaves_nothing(network_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    host, port, token = endpoint_of(network_pair.b)
    endpoint = b""
    if network_pair.name == "ucx":
        from transport.ucx.api import HOST_TRANSPORTS, make_context, make_worker

        worker = make_worker(make_context(HOST_TRANSPORTS))
        endpoint = worker.address.tobytes()
    introduction = handshake.Introduction(name="peer", endpoint=endpoint)
    hello = handshake.encode(kind_of(network_pair.b), token, introduction)
    before = num_descriptors()

    def gone(*arguments: object) -> bytes:
        raise BrokenPipeError("gone")

    monkeypatch.setattr(handshake, "encode", gone)
    for count in range(1, 4):
        with socket.create_connection((host, port), timeout=WAIT_S) as sock:
            sock.sendall(hello)
            assert sock.recv(1) == b""
        eventually(lambda count=count: network_pair.b.num_refused == count)
    eventually(lambda: num_descriptors() <= before)
    assert network_pair.b._admitted == {}
    network_pair.link.send(b"x").result(WAIT_S)


def test_connecting_to_what_is_no_plane_is_bounded_in_time(network_pair: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{network_pair.name}:127.0.0.1:{server.getsockname()[1]}:{'00' * 16}"
        with pytest.raises(DeadlineExceeded):  # the other end would say nothing for as long as it is there
            network_pair.a.connect(address, 0.2)


@pytest.mark.parametrize(
    "address", ["", "tcp", "tcp:127.0.0.1:1", "tcp:127.0.0.1:x:00", "udp:127.0.0.1:1:" + "00" * 16]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    plane = create_plane("tcp", Recorder())
    with pytest.raises(ConfigError):
        plane.connect(address, 1.0)
    plane.close()
