"""What the receiver of a KV stream refuses, and what it says of it."""

from __future__ import annotations

import msgspec
import pytest
import torch

from anabranch.errors import (
    AnabranchError,
    CapacityError,
    ChecksumMismatch,
    FrameTooLarge,
    MalformedMessage,
    StaleLease,
)
from tests.support.kv_streams import LAYOUT, NUM_CACHED, NUM_TOKENS, Stream, make_kv, send_chunks
from tests.support.waiting import WAIT_S, eventually
from transport.kv_stream import Ack, Commit, Slice
from transport.kv_stream.checksum import checksum
from transport.kv_stream.messages import encode

pytestmark = pytest.mark.unit


def slice_of(kv: torch.Tensor, at_layer: int, at: range, **changes: object) -> tuple[bytes, memoryview]:
    """A slice of all heads as it should be, but for `changes`."""
    rows = kv[at_layer : at_layer + 1, :, at.start : at.stop].contiguous()
    payload = memoryview(rows.view(torch.uint8).flatten().numpy()).cast("B")
    message = Slice(
        stream_id=7,
        generation=3,
        source_rank=0,
        seq=0,
        layer=at_layer,
        num_layers=1,
        head_start=0,
        num_heads=kv.shape[3],
        tokens=((at.start, len(at)),),
        checksum=checksum(payload),
    )
    return encode(msgspec.structs.replace(message, **changes)), payload


def commit_of(**changes: object) -> bytes:
    commit = Commit(stream_id=7, generation=3, source_rank=0, num_sources=1, num_slices=0, payload_bytes=0, token_id=1)
    return encode(msgspec.structs.replace(commit, **changes))


OFFENCES: dict[str, tuple[dict[str, object], type[AnabranchError]]] = {
    "wrong checksum": ({"checksum": 1}, ChecksumMismatch),
    "first token below the range": ({"tokens": ((NUM_CACHED - 1, 4),)}, MalformedMessage),
    "last token above the range": ({"tokens": ((NUM_TOKENS - 3, 4),)}, MalformedMessage),
    "negative token": ({"tokens": ((-1, 4),)}, MalformedMessage),
    "negative count": ({"tokens": ((NUM_CACHED, -4),)}, MalformedMessage),
    "no tokens": ({"tokens": ()}, MalformedMessage),
    "tokens not ascending": ({"tokens": ((10, 2), (6, 2))}, MalformedMessage),
    "layer above the model": ({"layer": 3}, MalformedMessage),
    "layers above the model": ({"layer": 2, "num_layers": 2}, MalformedMessage),
    "negative layer": ({"layer": -1}, MalformedMessage),
    "no layers": ({"num_layers": 0}, MalformedMessage),
    "head above the model": ({"head_start": 1}, MalformedMessage),
    "no heads": ({"num_heads": 0}, MalformedMessage),
    "payload of another size": ({"tokens": ((NUM_CACHED, 3),)}, MalformedMessage),
    "slice skipped": ({"seq": 1}, MalformedMessage),
    "source rank absurd": ({"source_rank": 1 << 40}, MalformedMessage),
}


@pytest.mark.parametrize(("changes", "kind"), OFFENCES.values(), ids=OFFENCES.keys())
def test_an_offence_fails_the_stream_and_is_told_the_sender(
    stream: Stream, changes: dict[str, object], kind: type[AnabranchError]
) -> None:
    link, handler = stream.raw_link()
    kv = make_kv(LAYOUT, NUM_TOKENS)
    link.send(*slice_of(kv, 0, range(NUM_CACHED, NUM_CACHED + 4), **changes))
    eventually(lambda: len(handler.acks) == 1)
    assert handler.codes == [kind.code]
    assert [type(error) for error in stream.pool.failures] == [kind]
    # The rest is drained, and a source rank is told once.
    source_rank = changes.get("source_rank", 0)
    link.send(*slice_of(kv, 1, range(NUM_CACHED, NUM_CACHED + 4), seq=2, source_rank=source_rank))
    link.send(commit_of(source_rank=source_rank))
    link.send(commit_of(stream_id=8))
    eventually(lambda: len(handler.acks) == 2)
    assert handler.codes == [kind.code, StaleLease.code]
    assert stream.pool.commits == []
    assert len(stream.pool.failures) == 1
    assert stream.pool.times.sum() == 0
    handler.plane.close()


@pytest.mark.parametrize("changes", [{"generation": 2}, {"generation": 4}, {"stream_id": 8}])
def test_a_stale_lease_is_refused_once_and_touches_nothing(stream: Stream, changes: dict[str, object]) -> None:
    link, handler = stream.raw_link()
    kv = make_kv(LAYOUT, NUM_TOKENS)
    for seq in range(5):
        link.send(*slice_of(kv, 0, range(NUM_CACHED, NUM_CACHED + 4), seq=seq, **changes)).result(WAIT_S)
    link.send(commit_of(**changes)).result(WAIT_S)
    eventually(lambda: len(handler.acks) == 1)
    assert handler.codes == [StaleLease.code]
    assert stream.pool.times.sum() == 0
    assert (stream.pool.commits, stream.pool.failures) == ([], [])
    # The stream itself goes on.
    sender = stream.open()
    send_chunks(sender, kv, [range(NUM_CACHED, NUM_TOKENS)])
    sender.commit(token_id=1)
    sender.wait_ack(WAIT_S)
    handler.plane.close()


def test_a_slice_that_comes_twice_fails_the_stream(stream: Stream) -> None:
    link, handler = stream.raw_link()
    kv = make_kv(LAYOUT, NUM_TOKENS)
    link.send(*slice_of(kv, 0, range(5, 9)))
    link.send(*slice_of(kv, 0, range(12, 16), seq=1))
    link.send(*slice_of(kv, 0, range(8, 13), seq=2))
    eventually(lambda: len(handler.acks) == 1)
    assert handler.codes == [MalformedMessage.code]
    assert "twice" in str(stream.pool.failures[0])
    assert stream.pool.times.max() == 1
    handler.plane.close()


@pytest.mark.parametrize("missing", ["token", "layer", "everything"])
def test_a_commit_of_an_incomplete_stream_is_refused(stream: Stream, missing: str) -> None:
    kv = make_kv(LAYOUT, NUM_TOKENS)
    sender = stream.open()
    layers = {"token": 3, "layer": 2, "everything": 0}[missing]
    for layer in range(layers):
        first = NUM_CACHED + 1 if missing == "token" and layer == 1 else NUM_CACHED
        sender.send_layer(layer, 0, first, kv[layer, 0, first:], kv[layer, 1, first:])
    sender.commit(token_id=1)
    with pytest.raises(MalformedMessage, match="incomplete"):
        sender.wait_ack(WAIT_S)
    assert stream.pool.commits == []
    assert [type(error) for error in stream.pool.failures] == [MalformedMessage]


@pytest.mark.parametrize("changes", [{"num_slices": 1}, {"payload_bytes": 1}, {"num_slices": -1}])
def test_a_commit_that_counts_otherwise_is_refused(stream: Stream, changes: dict[str, object]) -> None:
    link, handler = stream.raw_link()
    link.send(commit_of(**changes))
    eventually(lambda: len(handler.acks) == 1)
    assert handler.codes == [MalformedMessage.code]
    assert stream.pool.commits == []
    handler.plane.close()


def test_a_slice_above_the_limit_is_drained(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transport.kv_stream.receiver.MAX_SLICE_BYTES", 100)
    link, handler = stream.raw_link()
    link.send(*slice_of(make_kv(LAYOUT, NUM_TOKENS), 0, range(5, 9)))
    eventually(lambda: len(handler.acks) == 1)
    assert handler.codes == [FrameTooLarge.code]
    handler.plane.close()


def test_staging_is_bounded(stream: Stream) -> None:
    stream.receiver._pool.max_bytes = 0
    link, handler = stream.raw_link()
    link.send(*slice_of(make_kv(LAYOUT, NUM_TOKENS), 0, range(5, 9)))
    eventually(lambda: len(handler.acks) == 1)
    assert handler.codes == [CapacityError.code]
    handler.plane.close()


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        b"\x80",
        msgspec.msgpack.encode({"t": "x"}),
        msgspec.msgpack.encode({"t": "s", "stream_id": 7}),
        encode(Ack(stream_id=7, generation=3)),
        b"\x81\xa1t\xa1\xff",
    ],
)
def test_a_header_that_is_none_closes_its_link_alone(stream: Stream, header: bytes) -> None:
    link, handler = stream.raw_link()
    link.send(header, memoryview(b"payload"))
    eventually(lambda: len(handler.lost) == 1)
    assert stream.pool.failures == []
    sender = stream.open()
    send_chunks(sender, make_kv(LAYOUT, NUM_TOKENS), [range(NUM_CACHED, NUM_TOKENS)])
    sender.commit(token_id=1)
    sender.wait_ack(WAIT_S)
    handler.plane.close()


def test_a_commit_with_a_payload_closes_its_link(stream: Stream) -> None:
    link, handler = stream.raw_link()
    link.send(commit_of(), memoryview(b"payload"))
    eventually(lambda: len(handler.lost) == 1)
    assert stream.pool.commits == []
    handler.plane.close()
