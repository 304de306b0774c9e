"""KV streams between ranks of different meshes."""

from __future__ import annotations

import msgspec
import pytest
import torch

from anabranch.errors import (
    CapacityError,
)
from anabranch.parallel.reshard import plan_reshard, tokens_of
from tests.support.kv_streams import LAYOUT, Pool, chunks_of, destination_of, make_kv
from tests.support.waiting import WAIT_S
from transport.kv_stream import KvStreamReceiver, KvStreamSource
from transport.planes import create_plane

pytestmark = pytest.mark.unit

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
