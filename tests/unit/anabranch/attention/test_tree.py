"""Tree attention: the same values as one rank's, the same bits on all ranks, bytes and rounds by formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.attention.cp_batch import TreeBatch
from anabranch.attention.tree import TreeAttention
from anabranch.attention.tree_reduce import Reduction, TreeReduction
from anabranch.kernels.merge import merge
from anabranch.kernels.plain import PlainKernels
from anabranch.parallel.layout import KvLayout
from anabranch.parallel.placement import BlockCyclic
from anabranch.parallel.reshard import tokens_of
from anabranch.parallel.threads import ThreadGroup, run_ranks
from benchmarks.counting import CountingExchange
from benchmarks.reductions import GatherReduction, ScatterReduction, make_parts, num_rounds

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
World = Any
MakeWorld = Callable[..., World]
MakeReduction = Callable[[ThreadGroup], Reduction]
REDUCTIONS: dict[str, MakeReduction] = {
    "tree": TreeReduction,
    "scatter": ScatterReduction,
    "gather": GatherReduction,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def partials(
    size: int, shape: tuple[int, int, int], seed: int, spread: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each rank's `(out, lse)`; some rows of some ranks saw no key, and the first row is empty everywhere."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(size):
        out = torch.randn(shape, generator=generator)
        lse = torch.randn(shape[:2], generator=generator) * spread
        empty = torch.rand(shape[:2], generator=generator) < 0.4
        empty[0, 0] = True
        parts.append((out.masked_fill(empty.unsqueeze(-1), 0.0), lse.masked_fill(empty, -torch.inf)))
    return parts


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("size", range(1, 9))
def test_every_reduction_is_the_merge_and_the_same_on_all_ranks(name: str, size: int) -> None:
    for seed, spread in ((1, 1.0), (2, 60.0)):
        parts = partials(size, (3, 5, 8), seed, spread)
        want_out, want_lse = parts[0]
        for part in parts[1:]:
            want_out, want_lse = merge(want_out, want_lse, *part)

        def rank_main(group: ThreadGroup, parts: Any = parts) -> tuple[torch.Tensor, torch.Tensor]:
            reduction = REDUCTIONS[name](group)
            reduction.reduce(*parts[group.rank])
            return reduction.reduce(*parts[group.rank])  # kept buffers must not change the second result

        results = run_ranks(size, rank_main)
        for out, lse in results:
            assert torch.equal(out, results[0][0])
            assert torch.equal(lse, results[0][1])
        torch.testing.assert_close(results[0][0], want_out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(results[0][1], want_lse, rtol=1e-5, atol=1e-6)
        assert results[0][1][0, 0] == -torch.inf


@pytest.mark.parametrize("size", range(2, 9))
def test_bytes_and_rounds(size: int) -> None:
    """Per rank, with n bytes of one packed part; rows divide evenly by every size that is tried."""
    shape = (7, 120, 6)
    n = 4 * 7 * 120 * (6 + 2)
    parts = partials(size, shape, 3, 1.0)

    def count(make: Callable[[CountingExchange], Reduction]) -> list[tuple[int, int, int]]:
        def rank_main(group: ThreadGroup) -> tuple[int, int, int]:
            exchange = CountingExchange(group)
            make(exchange).reduce(*parts[group.rank])
            return exchange.sent_bytes, exchange.num_messages, exchange.num_rounds

        return run_ranks(size, rank_main)

    tree = count(TreeReduction)
    assert max(rounds for *_, rounds in tree) == num_rounds(size)
    core = 1 << (size.bit_length() - 1)
    extra = size - core
    levels = core.bit_length() - 1
    assert sum(sent for sent, *_ in tree) == (core * levels + 2 * extra) * n
    assert set(count(ScatterReduction)) == {(2 * (size - 1) * n // size, 2 * (size - 1), 2)}
    assert set(count(GatherReduction)) == {((size - 1) * n, size - 1, 1)}


def test_packed_parts_of_extreme_scores() -> None:
    out, lse = torch.ones(1, 3, 2), torch.tensor([[3e4, -3e4, -torch.inf]])
    out[0, 2] = 0.0
    pair, [total] = make_parts(2, out), make_parts(1, out).parts
    pair.parts[0].pack(out, lse)
    other = torch.tensor([[3e4, -torch.inf, -torch.inf]])
    pair.parts[1].pack((3 * out).masked_fill((other == -torch.inf).unsqueeze(-1), 0.0), other)
    pair.combine(total)
    got_out, got_lse = total.unpack()
    assert got_out[0, :, 0].tolist() == [2.0, 1.0, 0.0]
    assert got_lse[0].tolist() == pytest.approx([3e4 + 0.6931472, -3e4, -torch.inf])


def check_tree(world: World, window: int | None, *, tolerance: float = 2e-5) -> None:
    cp, scale = world.placement.cp, 0.3
    q, k, v = (world.rows(tensors, world.new) for tensors in (world.q, world.k, world.v))

    def rank_main(group: ThreadGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        batch = TreeBatch.from_plan(world.plan, world.placement.block_size, group.rank, cp, CPU)
        assert batch.positions_T.tolist() == [p for _, p in world.new]
        pool = world.pool(group.rank)
        attention = TreeAttention(PlainKernels(), pool, batch, TreeReduction(group))
        out, lse = attention.attend(0, q, k, v, scale, window)
        return out, lse, pool.data, batch.store_rows.numel()

    outs, lses = world.expected(scale, window)
    results = run_ranks(cp, rank_main)
    assert sum(num_stored for *_, num_stored in results) == len(world.new)
    for rank, (out, lse, pool, _) in enumerate(results):
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
        assert torch.equal(pool.nan_to_num(99.0), world.pool(rank, all_tokens=True).data.nan_to_num(99.0))
    torch.testing.assert_close(results[0][0].float(), world.rows(outs, world.new), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(results[0][1], world.rows(lses, world.new), rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cached=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    chunk=st.sampled_from([(), ((9, 0),), ((5, 23), (2, 1))]),
    cp=st.integers(1, 8),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    block_size=st.sampled_from([1, 2, 5, 16]),
    window=st.sampled_from([None, None, 1, 6, 33]),
    seed=st.integers(0, 2**16),
)
def test_equal_to_one_rank(
    make_world: MakeWorld,
    cached: list[int],
    chunk: tuple[tuple[int, int], ...],
    cp: int,
    heads: tuple[int, int],
    block_size: int,
    window: int | None,
    seed: int,
) -> None:
    lens = [(1, length) for length in cached] + list(chunk)
    world = make_world(lens=lens, cp=cp, block_size=block_size, heads=heads[0], kv_heads=heads[1], seed=seed)
    check_tree(world, window)


def test_bfloat16(make_world: MakeWorld) -> None:
    check_tree(make_world(lens=[(1, 100), (1, 3)], cp=3, dtype=torch.bfloat16), None, tolerance=2e-2)


def test_shards_of_a_long_context_are_even(make_world: MakeWorld) -> None:
    placement = BlockCyclic(block_size=16, cp=3)
    for num_tokens in (1, 15, 16, 17, 48, 1000):
        held = [placement.num_local(num_tokens, rank) for rank in range(3)]
        assert sum(held) == num_tokens
        assert max(held) - min(held) <= 16


@given(
    start=st.integers(0, 90),
    count=st.integers(0, 90),
    block_size=st.integers(1, 7),
    cp=st.integers(1, 5),
)
def test_placement_is_the_kv_layouts(start: int, count: int, block_size: int, cp: int) -> None:
    """What the pools hold is what `KvLayout` says that they hold, so KV streams may rely on it."""
    tokens = range(start, start + count)
    layout = KvLayout(dtype="float32", num_layers=1, num_kv_heads=1, head_dim=1, block_size=block_size, cp=cp)
    placement = BlockCyclic(block_size=block_size, cp=cp)
    table = [7, 3, 9, 1, 0, 2] * 40
    for rank in range(cp):
        positions = placement.local_positions(tokens, rank, CPU).tolist()
        assert positions == [p for run in tokens_of(layout, rank, tokens) for p in run]
        slots = placement.local_slots(tokens, rank, table, CPU).tolist()
        for position, slot in zip(positions, slots, strict=True):
            block, offset = divmod(position, block_size)
            assert placement.owner(position) == rank == block % cp
            assert slot == table[block // cp] * block_size + offset
