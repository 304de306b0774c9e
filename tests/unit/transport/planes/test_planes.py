"""Every plane keeps the same promises: order, sizes, buffers, losses, and nothing left behind."""

from __future__ import annotations

import mmap
import re
import threading
import time
from concurrent.futures import Future

import pytest

from anabranch.errors import (
    FrameTooLarge,
    MalformedMessage,
    Overloaded,
    PeerLost,
    TransportError,
)
from tests.support.planes import STATUS, Pair, Recorder, open_pair, pattern, payload_of
from tests.support.resources import num_descriptors
from tests.support.waiting import WAIT_S, eventually
from transport.planes import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    Link,
    base,
    create_plane,
)

pytestmark = pytest.mark.unit


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
        assert num_descriptors() <= before, name
        assert threading.active_count() == threads, name


def test_links_that_end_give_back_their_descriptors_while_the_plane_lives(pair: Pair) -> None:
    pair.link.send(b"x", payload_of(100_000)).result(WAIT_S)
    before = num_descriptors()
    for _ in range(5):
        link = pair.a.connect(pair.b.address, 5.0)
        link.send(b"x", payload_of(100_000)).result(WAIT_S)
        link.close()
    eventually(lambda: len(pair.at_a.lost) == 5 and len(pair.at_b.lost) == 5)
    eventually(lambda: num_descriptors() <= before, f"{num_descriptors()} descriptors, {before} before")


def test_an_idle_plane_takes_no_processor_time(pair: Pair) -> None:
    pair.link.send(b"x", payload_of(100_000)).result(WAIT_S)
    idle_s = 0.5
    eventually(lambda: len(pair.at_b.messages) == 1)
    used = time.process_time()
    threading.Event().wait(idle_s)
    assert time.process_time() - used < 0.2 * idle_s


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
