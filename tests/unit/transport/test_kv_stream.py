"""The KV stream: everything arrives once and in its place, or nobody believes that it has."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import (
    AnabranchError,
    CapacityError,
    ChecksumMismatch,
    DeadlineExceeded,
    FrameTooLarge,
    MalformedMessage,
    PeerLost,
    RequestCancelled,
    StaleLease,
    TransportUnavailable,
)
from anabranch.kernels.plain import PlainKernels
from anabranch.parallel.layout import KvLayout
from anabranch.parallel.reshard import plan_reshard, tokens_of
from anabranch.protocol.kv import KvDestination
from anabranch.request.token import TokenLogprob
from tests.support.waiting import eventually
from transport.kv_stream import Abort, Ack, Commit, KvStreamReceiver, KvStreamSender, KvStreamSource, Slice
from transport.kv_stream.checksum import checksum
from transport.kv_stream.messages import decode_to_receiver, decode_to_sender, encode
from transport.kv_stream.staging import StagingPool
from transport.planes import Link, Plane, available_planes, create_plane

pytestmark = pytest.mark.unit

WAIT_S = 10.0
STATUS = {status.name: status for status in available_planes()}
needs_ucx = pytest.mark.skipif(not STATUS["ucx"].usable, reason=f"UCX cannot be had: {STATUS['ucx'].reason}")
PLANES = ["inproc", "tcp", pytest.param("ucx", marks=needs_ucx)]

LAYOUT = KvLayout(dtype="float32", num_layers=3, num_kv_heads=4, head_dim=8, block_size=4)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_kv(layout: KvLayout, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """`[layers, 2, tokens, heads, head_dim]`, every element different."""
    shape = (layout.num_layers, 2, num_tokens, layout.num_kv_heads, layout.head_dim)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DTYPES[layout.dtype])


@dataclass
class Pool:
    """A sink that keeps what was placed, and how often."""

    layout: KvLayout
    num_tokens: int
    kv: torch.Tensor = field(init=False)
    times: torch.Tensor = field(init=False)
    commits: list[Commit] = field(default_factory=list)
    failures: list[AnabranchError] = field(default_factory=list)
    num_touched: int = 0
    before_place: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.kv = torch.zeros_like(make_kv(self.layout, self.num_tokens))
        self.times = torch.zeros(self.layout.num_layers, self.num_tokens, self.layout.num_kv_heads, dtype=torch.int64)

    def place(self, layer: int, head_start: int, tokens_T: torch.Tensor, kv_L2TKD: torch.Tensor) -> None:
        self.before_place()
        layers = slice(layer, layer + kv_L2TKD.shape[0])
        heads = slice(head_start, head_start + kv_L2TKD.shape[3])
        self.kv[layers, :, tokens_T, heads] = kv_L2TKD
        self.times[layers, tokens_T, heads] += 1

    def touch(self) -> None:
        self.num_touched += 1

    def committed(self, commit: Commit) -> None:
        self.commits.append(commit)

    def failed(self, error: AnabranchError) -> None:
        self.failures.append(error)


@dataclass
class Stream:
    """One destination rank that waits for stream 7, generation 3, and a source that can open it."""

    name: str
    receiver: KvStreamReceiver
    plane: Plane
    source: KvStreamSource
    pool: Pool
    destination: KvDestination

    def open(self) -> KvStreamSender:
        return self.source.open(self.destination, source_layout=LAYOUT)

    def raw_link(self) -> tuple[Link, RawHandler]:
        """A link to the receiver that is driven by hand."""
        handler = RawHandler()
        plane = create_plane(self.name, handler)
        handler.plane = plane
        return plane.connect(self.plane.address, 5.0), handler


class RawHandler:
    """Keeps the Acks that come back."""

    plane: Plane

    def __init__(self) -> None:
        self.acks: list[Ack] = []
        self.lost: list[Exception] = []

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None:
        self.acks.append(decode_to_sender(header))
        return None

    def on_payload(self, link: Link, header: bytes, buffer: memoryview) -> None:
        raise AssertionError("nobody sends payloads back")

    def on_lost(self, link: Link, error: Exception) -> None:
        self.lost.append(error)

    @property
    def codes(self) -> list[str | None]:
        return [ack.error.code if ack.error is not None else None for ack in self.acks]


NUM_TOKENS = 21
NUM_CACHED = 5


@pytest.fixture(params=PLANES)
def stream(request: pytest.FixtureRequest) -> Iterator[Stream]:
    receiver = KvStreamReceiver(max_staging_bytes=64 << 20)
    plane = create_plane(request.param, receiver)
    source = KvStreamSource(planes=(request.param,), configured=request.param, send_timeout_s=5.0)
    pool = Pool(LAYOUT, NUM_TOKENS)
    receiver.open(7, 3, layout=LAYOUT, rank=0, num_cached_tokens=NUM_CACHED, num_tokens=NUM_TOKENS, sink=pool)
    destination = KvDestination(
        worker="decode-0",
        stream_id=7,
        generation=3,
        layout=LAYOUT,
        addresses=({request.param: plane.address},),
        block_ids=(0, 1, 2, 3, 4, 5),
        num_cached_tokens=NUM_CACHED,
        num_tokens=NUM_TOKENS,
        lease_s=10.0,
    )
    yield Stream(request.param, receiver, plane, source, pool, destination)
    source.close()
    plane.close()
    receiver.close(7)
    assert receiver.num_streams == 0
    assert receiver.staging_bytes == 0
    assert source.staging_bytes == 0


def send_chunks(sender: KvStreamSender, kv: torch.Tensor, chunks: list[range]) -> None:
    for chunk in chunks:
        for layer in range(kv.shape[0]):
            rows = slice(chunk.start, chunk.stop)
            sender.send_layer(layer, 0, chunk.start, kv[layer, 0, rows].clone(), kv[layer, 1, rows].clone())


def chunks_of(start: int, stop: int, size: int) -> list[range]:
    return [range(first, min(first + size, stop)) for first in range(start, stop, size)]


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 100])
def test_all_tokens_arrive_once_and_the_first_token_with_them(stream: Stream, chunk_size: int) -> None:
    kv = make_kv(LAYOUT, NUM_TOKENS)
    sender = stream.open()
    send_chunks(sender, kv, chunks_of(NUM_CACHED, NUM_TOKENS, chunk_size))
    logprob = TokenLogprob(logprob=-0.5, top=((42, -0.5),))
    sender.commit(token_id=42, logprob=logprob, queue_s=0.25, prefill_s=0.5, num_cached_tokens=3)
    stats = sender.wait_ack(WAIT_S)
    assert torch.equal(stream.pool.kv[:, :, NUM_CACHED:], kv[:, :, NUM_CACHED:])
    assert stream.pool.times[:, NUM_CACHED:].eq(1).all()
    assert stream.pool.times[:, :NUM_CACHED].eq(0).all()
    (commit,) = stream.pool.commits
    assert (commit.token_id, commit.logprob, commit.queue_s, commit.prefill_s) == (42, logprob, 0.25, 0.5)
    assert commit.num_cached_tokens == 3
    assert stream.pool.failures == []
    assert stream.pool.num_touched > 0
    assert stats.payload_bytes == (NUM_TOKENS - NUM_CACHED) * LAYOUT.token_bytes
    assert stats.transport == stream.name
    assert 0.0 < stats.exposed_s <= stats.stream_s


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_dtype_and_large_slices(dtype: str) -> None:
    layout = KvLayout(dtype=dtype, num_layers=2, num_kv_heads=2, head_dim=64, block_size=16)
    kv = make_kv(layout, 9000)
    receiver, pool = KvStreamReceiver(), Pool(layout, 9000)
    plane = create_plane("tcp", receiver)
    receiver.open(1, 1, layout=layout, rank=0, num_cached_tokens=0, num_tokens=9000, sink=pool)
    source = KvStreamSource(planes=("tcp",), max_in_flight_bytes=4 << 20)
    sender = source.open(destination_of(layout, [plane], 9000), source_layout=layout)
    send_chunks(sender, kv, [range(9000)])
    sender.commit(token_id=1)
    assert sender.wait_ack(WAIT_S).payload_bytes == kv.nbytes
    assert torch.equal(pool.kv, kv)
    source.close()
    plane.close()


def destination_of(layout: KvLayout, planes: list[Plane], num_tokens: int, cached: int = 0) -> KvDestination:
    return KvDestination(
        worker="decode-0",
        stream_id=1,
        generation=1,
        layout=layout,
        addresses=tuple({plane.name: plane.address} for plane in planes),
        block_ids=(),
        num_cached_tokens=cached,
        num_tokens=num_tokens,
        lease_s=10.0,
    )


def test_rows_that_the_receiver_has_are_skipped(stream: Stream) -> None:
    kv = make_kv(LAYOUT, NUM_TOKENS)
    sender = stream.open()
    send_chunks(sender, kv, chunks_of(0, NUM_TOKENS, 8))
    sender.commit(token_id=1)
    assert sender.wait_ack(WAIT_S).payload_bytes == (NUM_TOKENS - NUM_CACHED) * LAYOUT.token_bytes
    assert stream.pool.times[:, :NUM_CACHED].eq(0).all()


def test_tensors_may_be_reused_as_soon_as_send_layer_returns(stream: Stream) -> None:
    kv = make_kv(LAYOUT, NUM_TOKENS)
    sender = stream.open()
    k_TKD, v_TKD = torch.empty_like(kv[0, 0, NUM_CACHED:]), torch.empty_like(kv[0, 1, NUM_CACHED:])
    for layer in range(LAYOUT.num_layers):
        k_TKD.copy_(kv[layer, 0, NUM_CACHED:])
        v_TKD.copy_(kv[layer, 1, NUM_CACHED:])
        sender.send_layer(layer, 0, NUM_CACHED, k_TKD, v_TKD)
    k_TKD.zero_()
    v_TKD.zero_()
    sender.commit(token_id=1)
    sender.wait_ack(WAIT_S)
    assert torch.equal(stream.pool.kv[:, :, NUM_CACHED:], kv[:, :, NUM_CACHED:])


def test_views_that_are_not_contiguous_are_sent_as_they_look(stream: Stream) -> None:
    kv = make_kv(LAYOUT, NUM_TOKENS)
    sender = stream.open()
    for layer in range(LAYOUT.num_layers):
        fused_TKD2 = torch.stack([kv[layer, 0, NUM_CACHED:], kv[layer, 1, NUM_CACHED:]], dim=-1)
        sender.send_layer(layer, 0, NUM_CACHED, fused_TKD2[..., 0], fused_TKD2[..., 1])
    sender.commit(token_id=1)
    sender.wait_ack(WAIT_S)
    assert torch.equal(stream.pool.kv[:, :, NUM_CACHED:], kv[:, :, NUM_CACHED:])


def test_streams_share_a_link_and_do_not_mix(stream: Stream) -> None:
    pools = {}
    for stream_id in range(100, 110):
        pools[stream_id] = Pool(LAYOUT, NUM_TOKENS)
        stream.receiver.open(
            stream_id, 1, layout=LAYOUT, rank=0, num_cached_tokens=0, num_tokens=NUM_TOKENS, sink=pools[stream_id]
        )

    def run(stream_id: int) -> None:
        destination = msgspec.structs.replace(
            stream.destination, stream_id=stream_id, generation=1, num_cached_tokens=0
        )
        sender = stream.source.open(destination, source_layout=LAYOUT)
        send_chunks(sender, make_kv(LAYOUT, NUM_TOKENS, stream_id), chunks_of(0, NUM_TOKENS, 6))
        sender.commit(token_id=stream_id)
        sender.wait_ack(WAIT_S)

    threads = [threading.Thread(target=run, args=(stream_id,)) for stream_id in pools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    for stream_id, pool in pools.items():
        assert [commit.token_id for commit in pool.commits] == [stream_id]
        assert torch.equal(pool.kv, make_kv(LAYOUT, NUM_TOKENS, stream_id))
        stream.receiver.close(stream_id)


# What the receiver refuses -----------------------------------------------------------------------------


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


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_no_header_raises_anything_but_malformed(header: bytes) -> None:
    for decode in (decode_to_receiver, decode_to_sender):
        with contextlib.suppress(MalformedMessage):
            decode(header)


# How streams end ---------------------------------------------------------------------------------------


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


class DeafLink:
    """A link whose messages never leave."""

    peer = "nobody"

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Future[None]]] = []

    def send(self, header: bytes, payload: memoryview | None = None) -> Future[None]:
        future: Future[None] = Future()
        self.sent.append((header, future))
        return future

    def close(self) -> None: ...


def test_bytes_in_flight_are_bounded_and_the_wait_has_a_deadline() -> None:
    layout = KvLayout(dtype="float32", num_layers=64, num_kv_heads=4, head_dim=64, block_size=16)
    link, pool = DeafLink(), StagingPool(1 << 30)
    sender = KvStreamSender(
        [link],
        destination_of(layout, [], 1000),
        source_layout=layout,
        source_rank=0,
        transport="deaf",
        kernels=PlainKernels(),
        pool=pool,
        max_in_flight_bytes=8 << 20,
        send_timeout_s=0.1,
        forget=lambda sender: None,
    )
    kv = torch.zeros(512, 4, 64)
    for layer in range(8):
        sender.send_layer(layer, 0, 0, kv, kv)
    with pytest.raises(DeadlineExceeded, match="in flight"):
        sender.send_layer(8, 0, 0, kv, kv)
    assert pool.used_bytes <= 8 << 20
    for _, future in link.sent:
        future.set_result(None)
    assert pool.used_bytes == 0
    assert isinstance(decode_to_receiver(link.sent[-1][0]), Abort)


def test_slices_that_wait_for_layers_leave_room_for_many_destinations() -> None:
    # One small layer: every destination's slice waits for more, and none comes before they all have a buffer.
    to = KvLayout(dtype="float32", num_layers=2, num_kv_heads=4, head_dim=64, block_size=4, cp=32)
    links, pool = [DeafLink() for _ in range(to.num_ranks)], StagingPool(1 << 30)
    sender = KvStreamSender(
        links,
        destination_of(to, [], 128),
        source_layout=msgspec.structs.replace(to, cp=1),
        source_rank=0,
        transport="deaf",
        kernels=PlainKernels(),
        pool=pool,
        max_in_flight_bytes=4 << 20,
        send_timeout_s=0.1,
        forget=lambda sender: None,
    )
    kv = torch.zeros(128, 4, 64)
    for layer in range(to.num_layers):
        sender.send_layer(layer, 0, 0, kv, kv)
    assert pool.used_bytes <= 2 << 20
    sender.commit(token_id=1)
    assert all(len(link.sent) == 2 for link in links)  # both layers in one slice, and the commit


@pytest.mark.parametrize(("num_tokens", "slices"), [(64, 12), (256, 15), (1024, 60)])
def test_layers_share_slices_of_at_most_a_share_of_the_stream(num_tokens: int, slices: int) -> None:
    layout = KvLayout(dtype="bfloat16", num_layers=60, num_kv_heads=3, head_dim=64, block_size=16)
    link = DeafLink()
    sender = KvStreamSender(
        [link],
        destination_of(layout, [], num_tokens),
        source_layout=layout,
        source_rank=0,
        transport="deaf",
        kernels=PlainKernels(),
        pool=StagingPool(1 << 30),
        max_in_flight_bytes=1 << 29,
        send_timeout_s=WAIT_S,
        forget=lambda sender: None,
    )
    kv = torch.zeros(min(num_tokens, 512), 3, 64, dtype=torch.bfloat16)
    for start in range(0, num_tokens, 512):
        for layer in range(layout.num_layers):
            sender.send_layer(layer, 0, start, kv, kv)
    sender.commit(token_id=1)
    assert len(link.sent) - 1 == slices


def test_addresses_must_fit_the_layout(stream: Stream) -> None:
    destination = msgspec.structs.replace(stream.destination, layout=msgspec.structs.replace(LAYOUT, tp=2))
    with pytest.raises(TransportUnavailable, match="2 ranks"):
        stream.source.open(destination, source_layout=LAYOUT)


# Several ranks -----------------------------------------------------------------------------------------

MESHES = [
    ((1, 1), (2, 1)),
    ((2, 1), (1, 1)),
    ((1, 1), (1, 2)),
    ((2, 1), (2, 2)),
    ((4, 1), (8, 1)),
    ((8, 1), (1, 3)),
    ((1, 2), (2, 2)),
    ((2, 2), (1, 1)),
]


@pytest.mark.parametrize(("source", "target"), MESHES)
def test_any_mesh_streams_to_any_mesh(source: tuple[int, int], target: tuple[int, int]) -> None:
    num_tokens, cached = 37, 6
    from_layout = msgspec.structs.replace(LAYOUT, tp=source[0], cp=source[1])
    to_layout = msgspec.structs.replace(LAYOUT, tp=target[0], cp=target[1], block_size=8)
    kv = make_kv(LAYOUT, num_tokens)
    receivers = [KvStreamReceiver() for _ in range(to_layout.num_ranks)]
    planes = [create_plane("inproc", receiver) for receiver in receivers]
    pools = [Pool(LAYOUT, num_tokens) for _ in receivers]
    for rank, receiver in enumerate(receivers):
        receiver.open(
            1, 1, layout=to_layout, rank=rank, num_cached_tokens=cached, num_tokens=num_tokens, sink=pools[rank]
        )
    destination = destination_of(to_layout, planes, num_tokens, cached)
    sources = [KvStreamSource(planes=("inproc",)) for _ in range(from_layout.num_ranks)]
    senders = [s.open(destination, source_layout=from_layout, source_rank=rank) for rank, s in enumerate(sources)]
    for chunk in chunks_of(0, num_tokens, 10):
        for layer in range(LAYOUT.num_layers):
            for rank, sender in enumerate(senders):
                cp_rank, tp_rank = divmod(rank, from_layout.tp)
                heads = from_layout.heads_of(tp_rank)
                held = [token for run in tokens_of(from_layout, cp_rank, chunk) for token in run]
                rows = kv[layer, :, held, heads.start : heads.stop]
                sender.send_layer(layer, heads.start, chunk.start, rows[0], rows[1], chunk=chunk)
    for sender in senders:
        sender.commit(token_id=5)
    sent = sum(sender.wait_ack(WAIT_S).payload_bytes for sender in senders)
    plan = [
        copy
        for chunk in chunks_of(0, num_tokens, 10)
        for copy in plan_reshard(from_layout, to_layout, chunk, wanted=range(cached, num_tokens))
    ]
    assert sent == LAYOUT.num_layers * sum(copy.nbytes(LAYOUT) for copy in plan)
    for rank, pool in enumerate(pools):
        cp_rank, tp_rank = divmod(rank, to_layout.tp)
        heads = to_layout.heads_of(tp_rank)
        expected = torch.zeros_like(pool.times)
        for run in tokens_of(to_layout, cp_rank, range(num_tokens)):
            expected[:, max(run.start, cached) : run.stop, heads.start : heads.stop] = 1
        assert torch.equal(pool.times, expected)
        mask = expected.bool()[:, None, :, :, None].expand_as(kv)
        assert torch.equal(pool.kv[mask], kv[mask])
        assert len(pool.commits) == 1
    for end in [*sources, *planes]:
        end.close()


def test_one_source_rank_that_aborts_fails_the_stream_everywhere() -> None:
    layout = msgspec.structs.replace(LAYOUT, tp=2)
    receiver, pool = KvStreamReceiver(), Pool(LAYOUT, 8)
    plane = create_plane("inproc", receiver)
    receiver.open(1, 1, layout=LAYOUT, rank=0, num_cached_tokens=0, num_tokens=8, sink=pool)
    sources = [KvStreamSource(planes=("inproc",)) for _ in range(2)]
    destination = destination_of(LAYOUT, [plane], 8)
    senders = [s.open(destination, source_layout=layout, source_rank=rank) for rank, s in enumerate(sources)]
    kv = make_kv(LAYOUT, 8)
    for rank, sender in enumerate(senders):
        for layer in range(3):
            rows = kv[layer, :, :, 2 * rank : 2 * rank + 2]
            sender.send_layer(layer, 2 * rank, 0, rows[0], rows[1])
    first = senders[0].commit(token_id=1)
    senders[1].abort(CapacityError("rank 1 has no memory"))
    with pytest.raises(CapacityError, match="rank 1"):
        first.result(WAIT_S)
    assert len(pool.failures) == 1
    assert pool.commits == []
    for end in [*sources, plane]:
        end.close()


# Which plane a stream takes ------------------------------------------------------------------------------


class NoPlane:
    """A plane that is usable by itself and joins no two ends, as UCX where they do not share memory."""

    address = "tcp:127.0.0.1:1:" + "00" * 16

    def __init__(self, error: AnabranchError) -> None:
        self.error = error

    def connect(self, address: str, timeout_s: float) -> Link:
        raise self.error

    def close(self) -> None:
        pass


@pytest.mark.parametrize("error", [TransportUnavailable("no transport"), PeerLost("refused")])
def test_with_auto_a_plane_that_does_not_reach_is_passed_over(
    error: AnabranchError, caplog: pytest.LogCaptureFixture
) -> None:
    kv = make_kv(LAYOUT, 8)
    receiver, pool = KvStreamReceiver(), Pool(LAYOUT, 8)
    plane = create_plane("tcp", receiver)
    receiver.open(1, 1, layout=LAYOUT, rank=0, num_cached_tokens=0, num_tokens=8, sink=pool)
    destination = msgspec.structs.replace(
        destination_of(LAYOUT, [plane], 8), addresses=({"ucx": "ucx:nowhere", "tcp": plane.address},)
    )
    source = KvStreamSource(planes=("ucx", "tcp"))
    source._planes["ucx"] = NoPlane(error)
    sender = source.open(destination, source_layout=LAYOUT)
    send_chunks(sender, kv, [range(8)])
    sender.commit(token_id=1)
    assert sender.wait_ack(WAIT_S).transport == "tcp"
    assert torch.equal(pool.kv, kv)
    assert f"ucx does not reach decode-0: {error}; another plane is tried" in caplog.text
    source.close()
    plane.close()


@pytest.mark.parametrize(("configured", "planes"), [("ucx", ("ucx", "tcp")), ("auto", ("ucx",))])
def test_a_named_plane_and_the_only_one_are_not_passed_over(configured: str, planes: tuple[str, ...]) -> None:
    source = KvStreamSource(planes=planes, configured=configured)
    source._planes["ucx"] = NoPlane(TransportUnavailable("no transport"))
    destination = msgspec.structs.replace(
        destination_of(LAYOUT, [], 8), addresses=({"ucx": "ucx:nowhere", "tcp": NoPlane.address},)
    )
    with pytest.raises(TransportUnavailable, match="no transport"):
        source.open(destination, source_layout=LAYOUT)
    source.close()


def test_nothing_is_kept_of_addresses_that_were_connected_to() -> None:
    receiver = KvStreamReceiver()
    planes = [create_plane("tcp", receiver) for _ in range(4)]
    source = KvStreamSource(planes=("tcp",))
    for port in range(1, 4):
        with pytest.raises(PeerLost):
            source._link("tcp", f"tcp:127.0.0.1:{port}:" + "00" * 16)
    for plane in planes:
        together = [threading.Thread(target=source._link, args=("tcp", plane.address)) for _ in range(5)]
        for thread in together:
            thread.start()
        for thread in together:
            thread.join(WAIT_S)
    assert len(source._links) == len(planes)
    assert source._connecting == {}
    source.close()
    for plane in planes:
        plane.close()
