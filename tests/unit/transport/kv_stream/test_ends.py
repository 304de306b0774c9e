"""How KV streams end: aborted, closed, or with one of their ends gone."""

from __future__ import annotations

import threading

import msgspec
import pytest
import torch

from anabranch.errors import (
    AnabranchError,
    DeadlineExceeded,
    PeerLost,
    RequestCancelled,
    StaleLease,
    TransportUnavailable,
)
from tests.support.kv_streams import LAYOUT, NUM_CACHED, NUM_TOKENS, Pool, Stream, make_kv, send_chunks
from tests.support.waiting import WAIT_S, eventually
from transport.kv_stream import Commit
from transport.planes import create_plane

pytestmark = pytest.mark.unit


def test_abort_fails_the_stream_at_both_ends_with_its_reason(stream: Stream) -> None:
    sender = stream.open()
    kv = make_kv(LAYOUT, NUM_TOKENS)
    send_chunks(sender, kv, [range(NUM_CACHED, 9)])
    sender.abort(RequestCancelled("the client went away"))
    sender.abort(RequestCancelled("again"))
    eventually(lambda: len(stream.pool.failures) == 1)
    assert isinstance(stream.pool.failures[0], RequestCancelled)
    assert "the client went away" in str(stream.pool.failures[0])
    with pytest.raises(RequestCancelled):
        sender.send_layer(0, 0, 9, kv[0, 0, 9:], kv[0, 1, 9:])
    with pytest.raises(RequestCancelled):
        sender.wait_ack(WAIT_S)
    with pytest.raises(RequestCancelled):
        sender.commit(token_id=1).result(WAIT_S)


def test_abort_after_the_commit_was_acknowledged_changes_nothing(stream: Stream) -> None:
    sender = stream.open()
    send_chunks(sender, make_kv(LAYOUT, NUM_TOKENS), [range(NUM_CACHED, NUM_TOKENS)])
    sender.commit(token_id=1)
    stats = sender.wait_ack(WAIT_S)
    sender.abort(RequestCancelled("late"))
    assert sender.wait_ack(WAIT_S) == stats
    assert stream.pool.failures == []


def test_a_receiver_that_closes_midway_stops_the_sender(stream: Stream) -> None:
    sender = stream.open()
    kv = make_kv(LAYOUT, NUM_TOKENS)
    sender.send_layer(0, 0, NUM_CACHED, kv[0, 0, NUM_CACHED:], kv[0, 1, NUM_CACHED:])
    for target in sender._targets:
        target.packer.flush()
    eventually(lambda: int(stream.pool.times.sum()) > 0)
    stream.receiver.close(7)
    with pytest.raises(RequestCancelled):
        sender.wait_ack(WAIT_S)
    with pytest.raises(RequestCancelled):
        sender.send_layer(1, 0, NUM_CACHED, kv[1, 0, NUM_CACHED:], kv[1, 1, NUM_CACHED:])
    placed = stream.pool.times.clone()
    assert (stream.pool.commits, stream.pool.failures) == ([], [])
    assert torch.equal(stream.pool.times, placed)


def test_late_slices_into_a_closed_stream_are_refused(stream: Stream) -> None:
    stream.receiver.close(7)
    sender = stream.open()
    send_chunks(sender, make_kv(LAYOUT, NUM_TOKENS), [range(NUM_CACHED, NUM_TOKENS)])
    sender.commit(token_id=1)
    with pytest.raises(StaleLease):
        sender.wait_ack(WAIT_S)
    assert stream.pool.times.sum() == 0


def test_close_waits_for_a_place_that_is_running(stream: Stream) -> None:
    inside, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert go_on.wait(WAIT_S)

    stream.pool.before_place = hold
    sender = stream.open()
    send_chunks(sender, make_kv(LAYOUT, NUM_TOKENS), [range(NUM_CACHED, NUM_TOKENS)])
    sender.commit(token_id=1)
    assert inside.wait(WAIT_S)

    def close() -> None:
        stream.receiver.close(7)
        closed.set()

    thread = threading.Thread(target=close)
    thread.start()
    assert not closed.wait(0.05)
    go_on.set()
    thread.join(WAIT_S)
    placed = stream.pool.times.clone()
    with pytest.raises(AnabranchError):
        sender.wait_ack(WAIT_S)
    assert torch.equal(stream.pool.times, placed)


def test_a_sink_may_close_its_stream_from_within(stream: Stream) -> None:
    class Closing(Pool):
        def committed(self, commit: Commit) -> None:
            super().committed(commit)
            stream.receiver.close(9)

    pool = Closing(LAYOUT, NUM_TOKENS)
    stream.receiver.open(9, 1, layout=LAYOUT, rank=0, num_cached_tokens=0, num_tokens=NUM_TOKENS, sink=pool)
    destination = msgspec.structs.replace(stream.destination, stream_id=9, generation=1, num_cached_tokens=0)
    sender = stream.source.open(destination, source_layout=LAYOUT)
    send_chunks(sender, make_kv(LAYOUT, NUM_TOKENS), [range(NUM_TOKENS)])
    sender.commit(token_id=1)
    sender.wait_ack(WAIT_S)
    assert stream.receiver.num_streams == 1


def test_a_sink_that_fails_fails_its_stream_alone(stream: Stream) -> None:
    def fail() -> None:
        raise RuntimeError("a bug in the sink")

    stream.pool.before_place = fail
    sender = stream.open()
    send_chunks(sender, make_kv(LAYOUT, NUM_TOKENS), [range(NUM_CACHED, NUM_TOKENS)])
    sender.commit(token_id=1)
    with pytest.raises(AnabranchError, match="a bug in the sink"):
        sender.wait_ack(WAIT_S)
    assert len(stream.pool.failures) == 1


def test_a_receiver_that_is_gone_fails_the_sender_and_a_new_stream_connects_again(stream: Stream) -> None:
    sender = stream.open()
    kv = make_kv(LAYOUT, NUM_TOKENS)
    send_chunks(sender, kv, [range(NUM_CACHED, 9)])
    stream.plane.close()
    with pytest.raises(PeerLost):
        sender.wait_ack(WAIT_S)
    with pytest.raises((PeerLost, TransportUnavailable)):
        stream.open()
    assert [type(error) for error in stream.pool.failures] in ([PeerLost], [])
    plane = create_plane(stream.name, stream.receiver)
    pool = Pool(LAYOUT, NUM_TOKENS)
    stream.receiver.open(11, 1, layout=LAYOUT, rank=0, num_cached_tokens=0, num_tokens=NUM_TOKENS, sink=pool)
    destination = msgspec.structs.replace(
        stream.destination, stream_id=11, generation=1, num_cached_tokens=0, addresses=({stream.name: plane.address},)
    )
    again = stream.source.open(destination, source_layout=LAYOUT)
    send_chunks(again, kv, [range(NUM_TOKENS)])
    again.commit(token_id=1)
    again.wait_ack(WAIT_S)
    stream.receiver.close(11)
    plane.close()


def test_a_sender_that_is_gone_fails_the_stream(stream: Stream) -> None:
    sender = stream.open()
    kv = make_kv(LAYOUT, NUM_TOKENS)
    send_chunks(sender, kv, [range(NUM_CACHED, 9), range(9, 12)])
    eventually(lambda: int(stream.pool.times.sum()) > 0)
    stream.source._planes[stream.name].close()
    eventually(lambda: len(stream.pool.failures) == 1)
    assert isinstance(stream.pool.failures[0], PeerLost)
    with pytest.raises(PeerLost):
        sender.wait_ack(WAIT_S)


def test_waiting_for_an_acknowledgement_is_bounded(stream: Stream) -> None:
    sender = stream.open()
    with pytest.raises(DeadlineExceeded, match="acknowledgement"):
        sender.wait_ack(0.01)
    sender.abort(RequestCancelled("enough"))
