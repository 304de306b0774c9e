"""Every plane keeps the same promises: order, sizes, buffers, losses, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from anabranch.errors import (
    ConfigError,
    DeadlineExceeded,
    FrameTooLarge,
    MalformedMessage,
    Overloaded,
    PeerLost,
    TransportError,
    TransportUnavailable,
)
from tests.support.resources import num_descriptors
from tests.support.waiting import eventually
from transport.planes import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    Link,
    Plane,
    PlaneStatus,
    available_planes,
    base,
    choose_plane,
    configured_planes,
    create_plane,
    handshake,
    reachable_planes,
    registry,
    stall,
    tcp,
    usable_planes,
)
from transport.planes.tcp import TcpPlane
from transport.planes.tcp_link import MAGIC, PREFIX, VERSION

pytestmark = pytest.mark.unit

WAIT_S = 10.0

STATUS = {status.name: status for status in available_planes()}
needs_ucx = pytest.mark.skipif(not STATUS["ucx"].usable, reason=f"UCX cannot be had: {STATUS['ucx'].reason}")
PLANES = ["inproc", "tcp", pytest.param("ucx", marks=needs_ucx)]


@dataclass
class Recorder:
    """A handler that keeps what it hears; `refuse` and `drain` say what to do with a header."""

    messages: list[tuple[bytes, bytes]] = field(default_factory=list)
    lost: list[tuple[Link, Exception]] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    refuse: Callable[[bytes], Exception | None] = lambda header: None
    drain: Callable[[bytes], bool] = lambda header: False
    wrong_size: bool = False

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None:
        if link not in self.links:
            self.links.append(link)
        if (error := self.refuse(header)) is not None:
            raise error
        if not payload_bytes:
            self.messages.append((header, b""))
            return None
        if self.drain(header):
            return None
        return memoryview(bytearray(payload_bytes + (1 if self.wrong_size else 0)))

    def on_payload(self, link: Link, header: bytes, buffer: memoryview) -> None:
        self.messages.append((header, bytes(buffer)))

    def on_lost(self, link: Link, error: Exception) -> None:
        self.lost.append((link, error))


@dataclass
class Pair:
    """Two planes of one kind; `a` has connected to `b`."""

    name: str
    at_a: Recorder
    at_b: Recorder
    a: Plane
    b: Plane
    link: Link


def open_pair(name: str) -> Pair:
    at_a, at_b = Recorder(), Recorder()
    a, b = create_plane(name, at_a), create_plane(name, at_b)
    return Pair(name, at_a, at_b, a, b, a.connect(b.address, 5.0))


@pytest.fixture(params=PLANES)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = open_pair(request.param)
    yield pair
    pair.a.close()
    pair.b.close()


def pattern(num_bytes: int, seed: int = 1) -> bytes:
    return bytes((index * 31 + seed) % 251 for index in range(min(num_bytes, 4096))) * (num_bytes // 4096 + 1)


def payload_of(num_bytes: int, seed: int = 1) -> memoryview:
    return memoryview(pattern(num_bytes, seed))[:num_bytes]


@pytest.mark.parametrize("num_bytes", [0, 1, 2999, 3000, 3001, 8191, 8192, 8193, 65_536, 100_003, 5_000_000])
def test_a_payload_arrives_as_it_was_sent(pair: Pair, num_bytes: int) -> None:
    payload = payload_of(num_bytes)
    pair.link.send(b"header", payload).result(WAIT_S)
    eventually(lambda: len(pair.at_b.messages) == 1)
    assert pair.at_b.messages == [(b"header", bytes(payload))]


@pytest.mark.parametrize("num_bytes", [0, 1, MAX_HEADER_BYTES])
def test_headers_of_every_length_arrive(pair: Pair, num_bytes: int) -> None:
    header = pattern(num_bytes)[:num_bytes]
    pair.link.send(header, payload_of(5000)).result(WAIT_S)
    eventually(lambda: len(pair.at_b.messages) == 1)
    assert pair.at_b.messages[0] == (header, bytes(payload_of(5000)))


def test_messages_of_all_sizes_arrive_in_order(pair: Pair) -> None:
    sizes = [0, 10, 70_000, 0, 3000, 3001, 1_000_000, 1, 0, 20_000] * 30
    futures = [pair.link.send(f"{i}".encode(), payload_of(size, i)) for i, size in enumerate(sizes)]
    for future in futures:
        future.result(WAIT_S)
    eventually(lambda: len(pair.at_b.messages) == len(sizes))
    expected = [(f"{i}".encode(), bytes(payload_of(size, i))) for i, size in enumerate(sizes)]
    assert pair.at_b.messages == expected


def test_many_small_messages_arrive_in_order(pair: Pair) -> None:
    futures = [pair.link.send(b"%d" % i) for i in range(5000)]
    futures[-1].result(WAIT_S)
    eventually(lambda: len(pair.at_b.messages) == 5000)
    assert [header for header, _ in pair.at_b.messages] == [b"%d" % i for i in range(5000)]


def test_a_link_works_both_ways_at_once(pair: Pair) -> None:
    pair.link.send(b"hello").result(WAIT_S)
    eventually(lambda: bool(pair.at_b.links))
    back = pair.at_b.links[0]
    futures: list[Future[None]] = []
    for i in range(50):
        futures.append(pair.link.send(b"to b %d" % i, payload_of(200_000, i)))
        futures.append(back.send(b"to a %d" % i, payload_of(150_000, i)))
    for future in futures:
        future.result(WAIT_S)
    eventually(lambda: len(pair.at_b.messages) == 51 and len(pair.at_a.messages) == 50)
    assert pair.at_a.messages == [(b"to a %d" % i, bytes(payload_of(150_000, i))) for i in range(50)]
    assert pair.at_b.messages[1:] == [(b"to b %d" % i, bytes(payload_of(200_000, i))) for i in range(50)]


def test_an_answer_may_be_sent_from_within_the_handler(pair: Pair) -> None:
    class Echo(Recorder):
        def on_payload(self, link: Link, header: bytes, buffer: memoryview) -> None:
            link.send(b"echo " + header, buffer)

    echo = create_plane(pair.name, Echo())
    try:
        pair.a.connect(echo.address, 5.0).send(b"x", payload_of(50_000))
        eventually(lambda: len(pair.at_a.messages) == 1)
        assert pair.at_a.messages == [(b"echo x", bytes(payload_of(50_000)))]
    finally:
        echo.close()


def test_links_do_not_disturb_each_other(pair: Pair) -> None:
    links = [pair.link, *(pair.a.connect(pair.b.address, 5.0) for _ in range(4))]

    def send_all(number: int) -> None:
        for i in range(40):
            links[number].send(b"%d %d" % (number, i), payload_of(30_000 * (i % 3), number)).result(WAIT_S)

    threads = [threading.Thread(target=send_all, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    eventually(lambda: len(pair.at_b.messages) == 200)
    for number in range(5):
        mine = [(h, p) for h, p in pair.at_b.messages if h.startswith(b"%d " % number)]
        assert mine == [(b"%d %d" % (number, i), bytes(payload_of(30_000 * (i % 3), number))) for i in range(40)]


def test_one_link_may_be_used_from_many_threads(pair: Pair) -> None:
    def send_all(number: int) -> None:
        for i in range(100):
            pair.link.send(b"%d %d" % (number, i), payload_of(5_000, number))

    threads = [threading.Thread(target=send_all, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(pair.at_b.messages) == 400)
    for number in range(4):
        mine = [h for h, _ in pair.at_b.messages if h.startswith(b"%d " % number)]
        assert mine == [b"%d %d" % (number, i) for i in range(100)]


def test_what_is_not_wanted_is_drained_and_the_next_message_arrives(pair: Pair) -> None:
    pair.at_b.drain = lambda header: header == b"unwanted"
    for num_bytes in (10, 5_000, 300_000, 20_000_000):
        pair.link.send(b"unwanted", payload_of(num_bytes)).result(WAIT_S)
        pair.link.send(b"wanted", payload_of(num_bytes)).result(WAIT_S)
    eventually(lambda: len(pair.at_b.messages) == 4)
    assert [len(payload) for _, payload in pair.at_b.messages] == [10, 5_000, 300_000, 20_000_000]


@pytest.mark.parametrize("size", ["header", "payload"])
def test_too_large_a_message_is_refused_before_it_leaves(pair: Pair, size: str) -> None:
    if size == "header":
        future = pair.link.send(b"x" * (MAX_HEADER_BYTES + 1))
    else:
        # Never written to, so it costs no memory.
        future = pair.link.send(b"x", memoryview(mmap.mmap(-1, MAX_PAYLOAD_BYTES + 1)))
    with pytest.raises(FrameTooLarge):
        future.result(WAIT_S)
    pair.link.send(b"fine").result(WAIT_S)
    eventually(lambda: pair.at_b.messages == [(b"fine", b"")])


@pytest.mark.parametrize("num_bytes", [0, 100, 100_000])
def test_a_handler_that_refuses_closes_the_link_and_the_plane_goes_on(pair: Pair, num_bytes: int) -> None:
    pair.at_b.refuse = lambda header: MalformedMessage("no") if header == b"bad" else None
    pair.link.send(b"bad", payload_of(num_bytes))
    eventually(lambda: len(pair.at_a.lost) == 1 and len(pair.at_b.lost) == 1)
    assert isinstance(pair.at_a.lost[0][1], TransportError)
    assert isinstance(pair.at_b.lost[0][1], MalformedMessage)
    with pytest.raises(TransportError):
        pair.link.send(b"more", payload_of(100_000)).result(WAIT_S)
    again = pair.a.connect(pair.b.address, 5.0)
    again.send(b"good", payload_of(9_000)).result(WAIT_S)
    eventually(lambda: (b"good", bytes(payload_of(9_000))) in pair.at_b.messages)


def test_a_handler_that_fails_closes_its_link_alone(pair: Pair) -> None:
    pair.at_b.refuse = lambda header: RuntimeError("a bug") if header == b"bad" else None
    other = pair.a.connect(pair.b.address, 5.0)
    pair.link.send(b"bad", payload_of(10))
    eventually(lambda: len(pair.at_b.lost) == 1)
    other.send(b"good").result(WAIT_S)
    eventually(lambda: (b"good", b"") in pair.at_b.messages)


@pytest.mark.parametrize("num_bytes", [10, 100_000])
def test_a_buffer_of_the_wrong_size_is_not_written(pair: Pair, num_bytes: int) -> None:
    pair.at_b.wrong_size = True
    pair.link.send(b"x", payload_of(num_bytes))
    eventually(lambda: len(pair.at_b.lost) == 1)
    assert pair.at_b.messages == []


def test_closing_a_link_is_heard_once_at_both_ends(pair: Pair) -> None:
    pair.link.send(b"last words").result(WAIT_S)
    pair.link.close()
    pair.link.close()
    eventually(lambda: len(pair.at_a.lost) == 1 and len(pair.at_b.lost) == 1)
    assert pair.at_b.messages == [(b"last words", b"")]
    with pytest.raises(PeerLost):
        pair.link.send(b"too late").result(WAIT_S)


def test_closing_a_plane_fails_what_is_on_its_way_and_is_heard_at_the_other_end(pair: Pair) -> None:
    pair.link.send(b"hello").result(WAIT_S)
    pair.b.close()
    eventually(lambda: len(pair.at_a.lost) == 1)
    with pytest.raises(PeerLost):
        pair.link.send(b"x", payload_of(100_000)).result(WAIT_S)
    assert len(pair.at_b.lost) == 1
    pair.b.close()


def test_connecting_to_a_plane_that_has_closed_raises_peer_lost(pair: Pair) -> None:
    pair.b.close()
    with pytest.raises(PeerLost):
        pair.a.connect(pair.b.address, 5.0)


def test_every_descriptor_and_thread_is_returned() -> None:
    names = [name for name in ("inproc", "tcp", "ucx") if STATUS[name].usable]
    for name in names:  # libraries open what they keep
        warm = open_pair(name)
        warm.link.send(b"x", payload_of(100_000)).result(WAIT_S)
        warm.a.close()
        warm.b.close()
    for name in names:
        before, threads = num_descriptors(), threading.active_count()
        for _ in range(3):
            pair = open_pair(name)
            extra = [pair.a.connect(pair.b.address, 5.0) for _ in range(3)]
            for link in [pair.link, *extra]:
                link.send(b"x", payload_of(100_000)).result(WAIT_S)
            extra[0].close()
            pair.a.close()
            pair.b.close()
        assert num_descriptors() == before, name
        assert threading.active_count() == threads, name


def test_links_that_end_give_back_their_descriptors_while_the_plane_lives(pair: Pair) -> None:
    pair.link.send(b"x", payload_of(100_000)).result(WAIT_S)
    before = num_descriptors()
    for _ in range(5):
        link = pair.a.connect(pair.b.address, 5.0)
        link.send(b"x", payload_of(100_000)).result(WAIT_S)
        link.close()
    eventually(lambda: len(pair.at_a.lost) == 5 and len(pair.at_b.lost) == 5)
    eventually(lambda: num_descriptors() == before, f"{num_descriptors()} descriptors, {before} before")


def test_an_idle_plane_takes_no_processor_time(pair: Pair) -> None:
    pair.link.send(b"x", payload_of(100_000)).result(WAIT_S)
    idle_s = 0.5
    eventually(lambda: len(pair.at_b.messages) == 1)
    used = time.process_time()
    threading.Event().wait(idle_s)
    assert time.process_time() - used < 0.2 * idle_s


# Strangers -----------------------------------------------------------------------------------------------


def endpoint_of(plane: Plane) -> tuple[str, int, bytes]:
    return handshake.parse_address(plane.name, plane.address)


@pytest.fixture(params=["tcp", pytest.param("ucx", marks=needs_ucx)])
def network_pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = open_pair(request.param)
    yield pair
    pair.a.close()
    pair.b.close()


def test_a_peer_that_takes_nothing_loses_the_link_by_name(network_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages without a payload have no buffers that would run out."""
    monkeypatch.setattr(base, "MAX_WAITING_MESSAGES", 100)
    pair = network_pair
    go_on = threading.Event()
    monkeypatch.setattr(pair.at_b, "on_header", lambda *_: go_on.wait(WAIT_S) and None)
    error: BaseException | None = None
    try:
        for _ in range(100_000):
            future = pair.link.send(bytes(MAX_HEADER_BYTES))
            if future.done() and (error := future.exception()) is not None:
                break
        assert isinstance(error, Overloaded), error
        assert re.fullmatch(r".* does not take what is sent: 100 messages wait", str(error))
        eventually(lambda: len(pair.at_a.lost) == 1)
        assert isinstance(pair.at_a.lost[0][1], Overloaded)
    finally:
        go_on.set()


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
    # The loop finds all of it in one turn: a newcomer, for whom the oldest gives way, and words of the oldest.
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
        from transport.planes.ucx_api import HOST_TRANSPORTS, make_context, make_worker

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
    eventually(lambda: num_descriptors() == before)
    assert network_pair.b._admitted == {}
    network_pair.link.send(b"x").result(WAIT_S)


def test_connecting_to_what_is_no_plane_is_bounded_in_time(network_pair: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{network_pair.name}:127.0.0.1:{server.getsockname()[1]}:{'00' * 16}"
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            network_pair.a.connect(address, 0.2)
        assert time.monotonic() - began < 5.0


@pytest.mark.parametrize(
    "address", ["", "tcp", "tcp:127.0.0.1:1", "tcp:127.0.0.1:x:00", "udp:127.0.0.1:1:" + "00" * 16]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    plane = create_plane("tcp", Recorder())
    with pytest.raises(ConfigError):
        plane.connect(address, 1.0)
    plane.close()


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


# Choosing ------------------------------------------------------------------------------------------------


def test_auto_takes_the_best_that_both_ends_have() -> None:
    everything = ("inproc", "ucx", "tcp")
    assert choose_plane("auto", everything, everything) == "inproc"
    assert choose_plane("auto", everything, ("tcp", "ucx")) == "ucx"
    assert choose_plane("auto", ("tcp",), everything) == "tcp"
    assert choose_plane("tcp", everything, everything) == "tcp"


def test_what_an_end_lacks_is_refused_with_the_remedy() -> None:
    with pytest.raises(TransportUnavailable, match=r"ucx.*pip install 'anabranch\[ucx-cu12\]'"):
        choose_plane("ucx", ("tcp",), ("ucx", "tcp")) if not STATUS["ucx"].usable else choose_plane(
            "ucx", ("ucx", "tcp"), ("tcp",)
        )
    with pytest.raises(TransportUnavailable, match="one process"):
        choose_plane("inproc", ("inproc", "tcp"), ("tcp",))
    with pytest.raises(TransportUnavailable, match="no plane in common"):
        choose_plane("auto", ("tcp",), ("inproc",))
    with pytest.raises(ConfigError, match="kv_transport"):
        choose_plane("carrier-pigeon", ("tcp",), ("tcp",))
    with pytest.raises(ConfigError, match="kv_transport"):
        create_plane("carrier-pigeon", Recorder())


def test_an_inproc_address_is_reachable_in_its_own_process_alone() -> None:
    plane = create_plane("inproc", Recorder())
    addresses = {"inproc": plane.address, "tcp": "tcp:127.0.0.1:1:" + "00" * 16}
    assert reachable_planes(addresses) == ("inproc", "tcp")
    elsewhere = {**addresses, "inproc": plane.address.replace(f":{os.getpid()}:", f":{os.getpid() + 1}:")}
    assert reachable_planes(elsewhere) == ("tcp",)
    plane.close()
    assert reachable_planes(addresses) == ("tcp",)


def test_usable_planes_are_those_whose_status_says_so() -> None:
    assert usable_planes() == tuple(status.name for status in available_planes() if status.usable)
    assert {"inproc", "tcp"} <= set(usable_planes())
    for status in available_planes():
        assert status.usable or (status.reason and status.remedy)


def test_a_plane_listens_on_loopback_alone() -> None:
    for name in usable_planes():
        plane = create_plane(name, Recorder())
        if name != "inproc":
            assert endpoint_of(plane)[0] == "127.0.0.1"
        plane.close()


def test_a_plane_is_named_or_all_that_work_are_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert configured_planes("tcp", "127.0.0.1") == ("tcp",)
    assert configured_planes("auto", "127.0.0.1") == usable_planes()
    assert not caplog.records
    with pytest.raises(ConfigError, match="kv_transport"):
        configured_planes("carrier-pigeon", "127.0.0.1")
    broken = PlaneStatus(name="ucx", usable=False, reason="it moves nothing", remedy="mend it", broken=True)
    monkeypatch.setattr(registry, "_ucx_status", lambda listen_host: broken)
    assert configured_planes("auto", "127.0.0.1") == ("inproc", "tcp")
    assert "kv_transport auto passes over ucx: it moves nothing; mend it" in caplog.text
    with pytest.raises(TransportUnavailable, match="kv_transport: ucx cannot be used: it moves nothing; mend it"):
        configured_planes("ucx", "127.0.0.1")


def test_an_interface_that_is_not_there_is_refused() -> None:
    with pytest.raises(TransportUnavailable, match="listen_host"):
        create_plane("tcp", Recorder(), listen_host="192.0.2.1")
