"""The M2N channel between processes: what one end notices when the other is killed or stopped."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anabranch.errors import PeerLost
from benchmarks.m2n_ends import next_answer
from tests.support.m2n import BACKENDS, a_call, an_answer, assert_same, process_shape
from tests.support.peer_process import PeerProcess, peer_processes
from tests.support.resources import holdings
from tests.support.waiting import eventually
from transport.m2n import Arrived, Call, Link, LinkMaker, Listener, create_link_maker, create_listener

pytestmark = pytest.mark.distributed

HIDDEN_SIZE = 16 * 1024  # 64 rows are 4 MiB: more than a socket takes
SHAPE = process_shape(HIDDEN_SIZE)
WAIT_S = 60.0


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(backend: str) -> Iterator[Callable[[], PeerProcess]]:
    with peer_processes("tests.support.m2n_peer", backend, str(HIDDEN_SIZE)) as start:
        yield start


@pytest.fixture
def maker(backend: str) -> Iterator[LinkMaker]:
    made = create_link_maker(SHAPE, backend)
    yield made
    made.close()


@pytest.fixture
def listener(backend: str) -> Iterator[Listener]:
    made = create_listener(SHAPE, backend)
    yield made
    made.close()


def a_node(start: Callable[[], PeerProcess]) -> PeerProcess:
    peer = start()
    peer.ask(do="serve")
    return peer


def addresses_of(peer: PeerProcess) -> dict[str, str]:
    return {backend: str(address) for backend, address in peer.addresses.items()}


def lost(link: Link, maker: LinkMaker) -> bool:
    """Whether `receive` raises PeerLost; answers that are left are dropped."""
    maker.wait(0.01)
    try:
        link.receive()
    except PeerLost:
        return True
    return False


def call_of(ticket: int) -> Call:
    return a_call(ticket, SHAPE, num_rows=64)


def test_calls_cross_and_a_node_that_is_killed_is_noticed(maker: LinkMaker, start: Callable[[], PeerProcess]) -> None:
    peer, other = a_node(start), a_node(start)
    link, survivor = (maker.dial(addresses_of(each), "node").attach() for each in (peer, other))
    for turn in range(10):
        for each in (link, survivor):
            each.send(call_of(turn))
            assert_same(next_answer(each, maker), an_answer(call_of(turn)))
    for turn in range(10, 20):
        link.send(call_of(turn))
    peer.kill()
    began_s = time.monotonic()
    maker.wait(WAIT_S)
    assert time.monotonic() - began_s < WAIT_S  # the loss ends the wait
    eventually(lambda: lost(link, maker), "the loss is noticed")
    with pytest.raises(PeerLost):
        link.send(call_of(30))
    link.close()
    survivor.send(call_of(30))
    assert_same(next_answer(survivor, maker), an_answer(call_of(30)))
    with pytest.raises(PeerLost):
        maker.dial(addresses_of(peer), "node").attach()


def serve(listener: Listener, until: Callable[[], object], what: str) -> None:
    """Answer calls until a condition holds."""

    def turn() -> object:
        listener.wait(0.01)
        for arrived in listener.poll():
            listener.answer(arrived, an_answer(arrived.call))
        return until()

    eventually(turn, what)


def with_peer(listener: Listener, peer: PeerProcess, **command: object) -> dict[str, object]:
    """Ask a rank for something and serve meanwhile."""
    answers: list[dict[str, object]] = []
    asks = threading.Thread(target=lambda: answers.append(peer.ask(**command)))
    asks.start()
    serve(listener, lambda: not asks.is_alive(), f"{command['do']} is done")
    return answers[0]


def test_a_rank_that_is_killed_is_noticed(listener: Listener, start: Callable[[], PeerProcess]) -> None:
    peer, other = start(), start()
    for each in (peer, other):
        with_peer(listener, each, do="connect", addresses=listener.addresses)
        with_peer(listener, each, do="send", first=0, times=3)
        assert with_peer(listener, each, do="receive", times=3) == {"tickets": [0, 1, 2]}
    peer.ask(do="send", first=10, times=8)
    arrived: list[Arrived] = []
    eventually(lambda: arrived.extend(listener.poll()) or arrived, "a call arrives")
    assert listener.num_links == 2
    peer.kill()
    serve(listener, lambda: listener.num_links == 1, "the loss is noticed")
    for late in arrived:
        listener.answer(late, an_answer(late.call))  # nothing happens
    with_peer(listener, other, do="send", first=20, times=3)
    assert with_peer(listener, other, do="receive", times=3) == {"tickets": [20, 21, 22]}


def test_nothing_blocks_where_the_node_is_stopped_and_all_comes_when_it_goes_on(
    maker: LinkMaker, start: Callable[[], PeerProcess]
) -> None:
    peer = a_node(start)
    link = maker.dial(addresses_of(peer), "node").attach()
    peer.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, peer.process.pid, os.WSTOPPED | os.WNOWAIT)
    for ticket in range(16):
        link.send(call_of(ticket))
    assert link.num_free == 0
    maker.wait(0.02)
    assert link.receive() is None
    peer.process.send_signal(signal.SIGCONT)
    for ticket in range(16):
        assert_same(next_answer(link, maker), an_answer(call_of(ticket)))


def test_nothing_blocks_where_the_rank_is_stopped_and_all_comes_when_it_goes_on(
    listener: Listener, start: Callable[[], PeerProcess]
) -> None:
    peer, other = start(), start()
    for each in (peer, other):
        with_peer(listener, each, do="connect", addresses=listener.addresses)
    waiting: list[Arrived] = []
    sends = threading.Thread(target=lambda: peer.ask(do="send", first=0, times=16))
    sends.start()
    # What a socket does not take at once follows when the rank waits, as `receive` makes it do.
    eventually(lambda: waiting.extend(listener.poll()) or not sends.is_alive(), "all are sent")
    sends.join()
    peer.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, peer.process.pid, os.WSTOPPED | os.WNOWAIT)
    for arrived in waiting:
        listener.answer(arrived, an_answer(arrived.call))
    with_peer(listener, other, do="send", first=20, times=3)
    assert with_peer(listener, other, do="receive", times=3) == {"tickets": [20, 21, 22]}
    assert listener.num_links == 2
    peer.process.send_signal(signal.SIGCONT)
    assert with_peer(listener, peer, do="receive", times=16) == {"tickets": list(range(16))}


def test_peers_that_are_killed_leave_nothing_behind(
    listener: Listener, maker: LinkMaker, start: Callable[[], PeerProcess]
) -> None:
    def die_once() -> None:
        peer = a_node(start)
        link = maker.dial(addresses_of(peer), "node").attach()
        with_peer(listener, peer, do="connect", addresses=listener.addresses)
        peer.ask(do="send", first=0, times=4)
        for ticket in range(4):
            link.send(call_of(ticket))
        peer.kill()
        eventually(lambda: lost(link, maker), "the node's loss is noticed")
        link.close()
        serve(listener, lambda: not listener.num_links, "the rank's loss is noticed")

    def num_mappings() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:anabranch")

    gc.collect()
    before, mapped = holdings(), num_mappings()
    gc.disable()  # nothing waits for the collector
    try:
        for _ in range(2):
            die_once()
    finally:
        gc.enable()
    assert not holdings().beyond(before, spare_threads=1) and num_mappings() == mapped
