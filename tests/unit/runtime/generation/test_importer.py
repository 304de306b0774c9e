"""Rows that arrive land in the slots of the reservation's blocks, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from anabranch.cache.paged_kv import PagedKv
from anabranch.errors import PeerLost
from anabranch.kernels.plain import PlainKernels
from runtime.generation.commands import GenerationEvent, OpenStream, StreamAlive, StreamCommitted, StreamFailed
from runtime.generation.importer import KvImport
from transport.kv_stream import Commit

pytestmark = pytest.mark.unit

HEADS, DIM, SIZE = 3, 2, 4
STREAM = OpenStream(stream_id=7, generation=1, block_ids=(5, 0, 3), num_cached_tokens=0, num_tokens=10)


def pool() -> PagedKv:
    return PagedKv(
        num_layers=2,
        num_blocks=6,
        block_size=SIZE,
        num_kv_heads=HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def importer(
    kv: PagedKv, events: list[GenerationEvent], *, head_start: int = 0, alive_every_s: float = 0.0
) -> KvImport:
    return KvImport(
        kv,
        PlainKernels(),
        STREAM,
        span=SIZE,
        head_start=head_start,
        alive_every_s=alive_every_s,
        emit=events.append,
    )


def rows(first: int, count: int, heads: int) -> torch.Tensor:
    """`[T, K, D]` whose values name token and head."""
    tokens = torch.arange(first, first + count).view(-1, 1, 1)
    return (100.0 * tokens + 10.0 * torch.arange(heads).view(1, -1, 1) + torch.arange(DIM)).contiguous()


def test_rows_cross_blocks_in_the_order_of_the_table() -> None:
    kv = pool()
    k_TKD = rows(2, 7, HEADS)
    sink = importer(kv, [])
    sink.place(1, 0, torch.arange(2, 7), torch.stack((k_TKD[:5], -k_TKD[:5]))[None])
    sink.place(1, 0, torch.arange(7, 9), torch.stack((k_TKD[5:], -k_TKD[5:]))[None])
    k_slots, v_slots = kv.layer(1).slots()
    # Tokens 2 to 8: the end of block 5, block 0, the beginning of block 3.
    slots = [22, 23, 0, 1, 2, 3, 12]
    assert torch.equal(k_slots[slots], k_TKD)
    assert torch.equal(v_slots[slots], -k_TKD)
    untouched = sorted(set(range(24)) - set(slots))
    assert not k_slots[untouched].any()
    assert not v_slots[untouched].any()
    assert not kv.data[0].any()


def test_tokens_with_gaps_and_many_layers_of_the_same_tokens() -> None:
    kv = pool()
    sink = importer(kv, [])
    tokens_T = torch.tensor([0, 1, 8, 9])
    kv_L2TKD = torch.stack([rows(first, 4, HEADS) for first in range(4)]).view(2, 2, 4, HEADS, DIM)
    sink.place(0, 0, tokens_T, kv_L2TKD)
    for layer, landed in enumerate(kv_L2TKD):
        for slots_SKD, rows_TKD in zip(kv.layer(layer).slots(), landed, strict=True):
            assert torch.equal(slots_SKD[[20, 21, 12, 13]], rows_TKD)


def test_some_heads_of_a_rank_that_holds_later_ones() -> None:
    kv = pool()
    k_TKD = rows(0, 1, 2)
    importer(kv, [], head_start=4).place(0, 5, torch.tensor([0]), torch.stack((k_TKD, k_TKD))[None])
    k_slots, _ = kv.layer(0).slots()
    assert torch.equal(k_slots[20, 1:], k_TKD[0])
    assert not k_slots[20, 0].any()


def test_what_happens_to_the_stream_is_passed_on() -> None:
    events: list[GenerationEvent] = []
    sink = importer(pool(), events, alive_every_s=60.0)
    for _ in range(5):
        sink.touch()
    commit = Commit(stream_id=7, generation=1, source_rank=0, num_sources=1, num_slices=0, payload_bytes=0, token_id=42)
    sink.committed(commit)
    sink.failed(PeerLost("gone"))
    assert [type(event) for event in events] == [StreamAlive, StreamCommitted, StreamFailed]
    assert {event.stream_id for event in events} == {7}
    assert isinstance(events[1], StreamCommitted)
    assert events[1].token_id == 42
    assert isinstance(events[2], StreamFailed)
    assert str(events[2].error.to_error()) == "gone"


def test_every_slice_is_a_sign_of_life_where_none_came_for_long() -> None:
    events: list[GenerationEvent] = []
    sink = importer(pool(), events)
    sink.touch()
    sink.touch()
    assert events == [StreamAlive(stream_id=7)] * 2
