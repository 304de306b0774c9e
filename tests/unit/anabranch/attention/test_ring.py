"""Ring attention: the same values as one rank's attention, whatever the lengths, and KV where it belongs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.attention.cp_batch import RingBatch
from anabranch.attention.ring import RingAttention, Variant
from anabranch.attention.segments import length
from anabranch.kernels.native import select_kernels
from anabranch.kernels.plain import PlainKernels
from anabranch.parallel.threads import ThreadGroup, run_ranks

pytestmark = pytest.mark.unit
VARIANTS: list[Variant] = ["pass_kv", "pass_q"]
World = Any
MakeWorld = Callable[..., World]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tokens_of(batch: RingBatch) -> list[tuple[int, int]]:
    """(sequence in the plan, position) of each of the rank's rows."""
    shares = batch.geometry.shares[batch.rank]
    return [(b, p) for b, share in enumerate(shares) for p in (*share.low, *share.high)]


def check_ring(
    world: World, variant: Variant, window: int | None, *, tolerance: float = 2e-5, native: bool = False
) -> None:
    cp, scale = world.placement.cp, 0.3

    def rank_main(group: ThreadGroup) -> tuple[RingBatch, torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = RingBatch.from_plan(world.plan, world.placement.block_size, group.rank, cp, torch.device("cpu"))
        mine = tokens_of(batch)
        pool = world.pool(group.rank)
        kernels = select_kernels(torch.device("cpu"), world.q[0].dtype) if native else PlainKernels()
        attention = RingAttention(kernels, pool, batch, group, variant)
        parts = (world.rows(tensors, mine) for tensors in (world.q, world.k, world.v))
        out, lse = attention.attend(0, *parts, scale, window)
        return batch, out, lse, pool.data

    outs, lses = world.expected(scale, window)
    results = run_ranks(cp, rank_main)
    assert sorted(token for batch, *_ in results for token in tokens_of(batch)) == world.new
    for rank, (batch, out, lse, pool) in enumerate(results):
        mine = tokens_of(batch)
        assert out.dtype == world.q[0].dtype
        torch.testing.assert_close(out.float(), world.rows(outs, mine), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse, world.rows(lses, mine), rtol=tolerance, atol=tolerance)
        assert torch.equal(pool.nan_to_num(99.0), world.pool(rank, all_tokens=True).data.nan_to_num(99.0))


@pytest.mark.parametrize("variant", VARIANTS)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lens=st.lists(st.tuples(st.integers(1, 40), st.one_of(st.just(0), st.integers(0, 60))), min_size=1, max_size=4),
    cp=st.integers(1, 8),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1), (6, 2)]),
    block_size=st.sampled_from([1, 2, 3, 8]),
    window=st.sampled_from([None, None, 1, 4, 17]),
    seed=st.integers(0, 2**16),
)
def test_equal_to_one_rank(
    make_world: MakeWorld,
    variant: Variant,
    lens: list[tuple[int, int]],
    cp: int,
    heads: tuple[int, int],
    block_size: int,
    window: int | None,
    seed: int,
) -> None:
    world = make_world(lens=lens, cp=cp, block_size=block_size, heads=heads[0], kv_heads=heads[1], seed=seed)
    check_ring(world, variant, window)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("cp", [2, 3])
def test_longer_than_a_masked_cut(make_world: MakeWorld, variant: Variant, window: int | None, cp: int) -> None:
    check_ring(make_world(lens=[(1500, 700), (5, 0), (1, 900)], cp=cp, block_size=16), variant, window)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16(make_world: MakeWorld, variant: Variant) -> None:
    check_ring(make_world(lens=[(60, 30)], cp=4, dtype=torch.bfloat16), variant, None, tolerance=2e-2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_on_the_kernels_of_a_worker(
    make_world: MakeWorld, variant: Variant, dtype: torch.dtype, tolerance: float
) -> None:
    """Native ones where there is a compiler; a rank's own shard is a paged context of blocks of one token."""
    world = make_world(lens=[(300, 77), (2, 0), (40, 5)], cp=2, heads=6, kv_heads=2, head_dim=32, dtype=dtype)
    check_ring(world, variant, None, tolerance=tolerance, native=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_follow_chunks(make_world: MakeWorld, variant: Variant) -> None:
    """KV stored by one chunk's ring is what the next chunk's ring reads, for layers with and without a window."""
    whole = make_world(lens=[(50, 0), (37, 0)], cp=3)
    outs, _ = whole.expected(0.3, None)
    windowed, _ = whole.expected(0.3, 9)

    def rank_main(group: ThreadGroup) -> list[tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor]]:
        pool, wide = whole.pool(group.rank), whole.pool(group.rank)
        results = []
        for step in whole.in_chunks(13):
            batch = RingBatch.from_plan(step, whole.placement.block_size, group.rank, 3, torch.device("cpu"))
            mine = [(int(step.sequences[b].request_id[1:]), p) for b, p in tokens_of(batch)]
            q, k, v = (whole.rows(tensors, mine) for tensors in (whole.q, whole.k, whole.v))
            ring = RingAttention(PlainKernels(), pool, batch, group, variant)
            first, _ = ring.attend(0, q, k, v, 0.3, None)
            ring.kv = wide
            second, _ = ring.attend(0, q, k, v, 0.3, 9)
            results.append((mine, first, second))
        assert torch.equal(pool.data.nan_to_num(9.0), whole.pool(group.rank, all_tokens=True).data.nan_to_num(9.0))
        return results

    for results in run_ranks(3, rank_main):
        for mine, first, second in results:
            torch.testing.assert_close(first, whole.rows(outs, mine), rtol=2e-5, atol=2e-5)
            torch.testing.assert_close(second, whole.rows(windowed, mine), rtol=2e-5, atol=2e-5)


def test_batch_of_a_rank(make_world: MakeWorld) -> None:
    """Rows, positions, token ids and sampled rows; rank 0 samples, also from prompts of one token."""
    world = make_world(lens=[(9, 3), (1, 0), (2, 5)], cp=2)
    first, second = (RingBatch.from_plan(world.plan, 2, rank, 2, torch.device("cpu")) for rank in range(2))
    # 9 tokens at 3..11 in pieces of 2, 2, 2, 3; one token in the last piece; two in the second and the last.
    assert first.positions_T.tolist() == [3, 4, 9, 10, 11, 0, 6]
    assert first.token_ids_T.tolist() == [0, 1, 6, 7, 8, 100, 201]
    assert first.sample_rows_S.tolist() == [4, 6]
    assert second.positions_T.tolist() == [5, 6, 7, 8, 5]
    assert second.token_ids_T.tolist() == [2, 3, 4, 5, 200]
    assert second.sample_rows_S.tolist() == []
    assert tokens_of(second) == [(0, 5), (0, 6), (0, 7), (0, 8), (2, 5)]


@pytest.mark.parametrize("cp", [2, 4])
def test_zigzag_evens_the_scores_out(make_world: MakeWorld, cp: int) -> None:
    world = make_world(lens=[(64 * cp, 0)], cp=cp, block_size=16)
    geometry = RingBatch.from_plan(world.plan, 16, 0, cp, torch.device("cpu")).geometry

    def scores(q_rank: int, kv_rank: int) -> float:
        if q_rank == kv_rank:
            [context] = geometry.own_batch(q_rank).context_lens
            return context * context / 2
        return sum(length(part.q) * length(part.kv) for part in geometry.segments(q_rank, kv_rank, None))

    assert {scores(q, kv) for q in range(cp) for kv in range(cp)} == {64 * 64 / 2}
