"""The KV stream: everything arrives once and in its place."""

from __future__ import annotations

import threading

import msgspec
import pytest
import torch

from anabranch.parallel.layout import KvLayout
from anabranch.request.token import TokenLogprob
from tests.support.kv_streams import (
    LAYOUT,
    NUM_CACHED,
    NUM_TOKENS,
    Pool,
    Stream,
    chunks_of,
    destination_of,
    make_kv,
    send_chunks,
)
from tests.support.waiting import WAIT_S
from transport.kv_stream import KvStreamReceiver, KvStreamSource
from transport.planes import create_plane

pytestmark = pytest.mark.unit


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
