"""Planes between processes, and what one process notices when the other is killed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from anabranch.errors import DeadlineExceeded, PeerLost, TransportError
from tests.support import plane_peer
from tests.support.peer_process import WAIT_S, PeerProcess, peer_processes
from tests.support.resources import num_descriptors
from tests.support.waiting import eventually
from transport.planes import Link, Plane, available_planes, stall

pytestmark = pytest.mark.distributed

STATUS = {status.name: status for status in available_planes()}
needs_ucx = pytest.mark.skipif(not STATUS["ucx"].usable, reason=f"UCX cannot be had: {STATUS['ucx'].reason}")
KINDS = ["tcp", pytest.param("ucx", marks=needs_ucx), pytest.param("ucx-net", marks=needs_ucx)]
BIG = 64 << 20


class Recorder:
    """This process's handler; `announced` is set when a payload begins."""

    def __init__(self) -> None:
        self.announced = threading.Event()
        self.num_payloads = 0
        self.lost: list[Exception] = []
        self.links: list[Link] = []
        self._buffer = memoryview(bytearray(BIG))

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None:
        if link not in self.links:
            self.links.append(link)
        self.announced.set()
        return self._buffer[:payload_bytes]

    def on_payload(self, link: Link, header: bytes, buffer: memoryview) -> None:
        self.num_payloads += 1

    def on_lost(self, link: Link, error: Exception) -> None:
        self.lost.append(error)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def plane(kind: str, recorder: Recorder) -> Iterator[Plane]:
    plane: Plane = plane_peer.make_plane(kind, recorder)
    yield plane
    plane.close()


@pytest.fixture
def start(kind: str) -> Iterator[Callable[[], PeerProcess]]:
    with peer_processes("tests.support.plane_peer", kind) as start:
        yield start


def test_payloads_cross_processes_both_ways(plane: Plane, recorder: Recorder, start: Callable[[], PeerProcess]) -> None:
    peer = start()
    link = plane.connect(str(peer.addresses["plane"]), 10.0)
    for num_bytes in (0, 100, 10_000, 5_000_000):
        link.send(b"x", memoryview(bytearray(num_bytes))).result(WAIT_S)
    eventually(lambda: peer.ask(do="seen") == {"headers": 4, "payloads": 3, "lost": []}, "all arrive")
    peer.ask(do="connect", address=plane.address)
    peer.ask(do="send", num_bytes=5_000_000, times=20)
    eventually(lambda: recorder.num_payloads == 20, "all come back")


def test_a_receiver_that_is_killed_within_a_payload_is_noticed(
    plane: Plane, recorder: Recorder, start: Callable[[], PeerProcess]
) -> None:
    peer, other = start(), start()
    survivor = plane.connect(str(other.addresses["plane"]), 10.0)
    survivor.send(b"x", memoryview(bytearray(100_000))).result(WAIT_S)
    link = plane.connect(str(peer.addresses["plane"]), 10.0)
    payload = memoryview(bytearray(BIG))
    futures = [link.send(b"%d" % i, payload) for i in range(16)]
    eventually(lambda: peer.ask(do="seen")["headers"] != 0, "the first payload begins")
    peer.kill()
    eventually(lambda: bool(recorder.lost), "the loss is noticed", WAIT_S)
    with pytest.raises(PeerLost):
        futures[-1].result(WAIT_S)
    assert all(future.done() for future in futures)
    with pytest.raises(TransportError):
        link.send(b"x").result(WAIT_S)
    survivor.send(b"x", memoryview(bytearray(100_000))).result(WAIT_S)
    eventually(lambda: other.ask(do="seen")["payloads"] == 2, "the other link goes on")
    assert len(recorder.lost) == 1


@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.03])
def test_a_sender_that_is_killed_within_a_payload_is_noticed(
    plane: Plane, recorder: Recorder, start: Callable[[], PeerProcess], delay_s: float
) -> None:
    peer = start()
    peer.ask(do="connect", address=plane.address)
    peer.ask(do="send", num_bytes=BIG, times=64)
    assert recorder.announced.wait(WAIT_S)
    threading.Event().wait(delay_s)  # kills at different places within a copy
    peer.kill()
    eventually(lambda: len(recorder.lost) == 1, "the loss is noticed", WAIT_S)
    # This process lives, and its plane serves the next peer.
    count, other = recorder.num_payloads, start()
    other.ask(do="connect", address=plane.address)
    other.ask(do="send", num_bytes=1_000_000, times=3)
    eventually(lambda: recorder.num_payloads == count + 3, "the next peer is served")


def test_an_idle_peer_that_is_killed_is_noticed(
    plane: Plane, recorder: Recorder, start: Callable[[], PeerProcess]
) -> None:
    peer = start()
    link = plane.connect(str(peer.addresses["plane"]), 10.0)
    link.send(b"x", memoryview(bytearray(100_000))).result(WAIT_S)
    peer.kill()
    eventually(lambda: len(recorder.lost) == 1, "the loss is noticed", WAIT_S)
    assert isinstance(recorder.lost[0], PeerLost)
    with pytest.raises(TransportError):
        plane.connect(str(peer.addresses["plane"]), 1.0)


def test_a_peer_that_is_frozen_is_given_up_in_time(
    plane: Plane, recorder: Recorder, start: Callable[[], PeerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stall, "STALL_TIMEOUT_S", 0.2)
    monkeypatch.setattr(stall, "MIN_BYTES_PER_S", 1 << 40)
    peer = start()
    link = plane.connect(str(peer.addresses["plane"]), 10.0)
    link.send(b"x", memoryview(bytearray(100_000))).result(WAIT_S)
    eventually(lambda: peer.ask(do="seen")["payloads"] == 1, "the first arrives")
    peer.process.send_signal(signal.SIGSTOP)
    future = link.send(b"x", memoryview(bytearray(BIG)))
    with pytest.raises(DeadlineExceeded):
        future.result(WAIT_S)


def test_peers_that_are_killed_leave_no_descriptor_behind(
    plane: Plane, recorder: Recorder, start: Callable[[], PeerProcess]
) -> None:
    def die_once() -> None:
        peer = start()
        peer.ask(do="connect", address=plane.address)
        recorder.announced.clear()
        count = len(recorder.lost)
        peer.ask(do="send", num_bytes=BIG, times=16)
        assert recorder.announced.wait(WAIT_S)
        # Traffic both ways: what this end has posted must be let go of as well.
        recorder.links[-1].send(b"back", memoryview(bytearray(BIG)))
        peer.kill()
        eventually(lambda: len(recorder.lost) == count + 1, "the loss is noticed", WAIT_S)

    before = num_descriptors()
    for _ in range(4):
        die_once()
    eventually(lambda: num_descriptors() <= before, "what the links had is given back")
