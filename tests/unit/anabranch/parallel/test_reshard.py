"""Every element of every destination rank arrives exactly once, from a rank that holds it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.parallel.layout import KvLayout
from anabranch.parallel.reshard import Copy, plan_reshard, tokens_of

pytestmark = pytest.mark.unit

HEAD_DIM = 3


def layout(*, heads: int, tp: int = 1, cp: int = 1, block_size: int = 4) -> KvLayout:
    return KvLayout(
        dtype="float32",
        num_layers=2,
        num_kv_heads=heads,
        head_dim=HEAD_DIM,
        block_size=block_size,
        tp=tp,
        cp=cp,
    )


def positions(runs: list[range]) -> list[int]:
    return [token for run in runs for token in run]


def held(side: KvLayout, rank: int, tokens: range) -> tuple[range, list[int]]:
    """Heads and positions that a rank holds."""
    cp_rank, tp_rank = divmod(rank, side.tp)
    return side.heads_of(tp_rank), positions(tokens_of(side, cp_rank, tokens))


@st.composite
def sides(draw: st.DrawFn) -> tuple[KvLayout, KvLayout]:
    heads = draw(st.integers(1, 6))
    source, destination = (
        layout(
            heads=heads,
            tp=draw(st.integers(1, 6)),
            cp=draw(st.integers(1, 5)),
            block_size=draw(st.integers(1, 7)),
        )
        for _ in range(2)
    )
    return source, destination


def simulate(source: KvLayout, destination: KvLayout, tokens: range, wanted: range, plan: tuple[Copy, ...]) -> None:
    """Move small arrays by the plan; every cell is marked with its head and position."""
    heads = source.num_kv_heads
    width = tokens.stop
    truth = np.arange(heads * width * HEAD_DIM, dtype=np.int64).reshape(heads, width, HEAD_DIM) + 1
    outbox = []
    for rank in range(source.num_ranks):
        mine = np.zeros_like(truth)
        rank_heads, rank_tokens = held(source, rank, tokens)
        for head in rank_heads:
            mine[head, rank_tokens] = truth[head, rank_tokens]
        outbox.append(mine)
    inbox = [np.zeros_like(truth) for _ in range(destination.num_ranks)]
    arrivals = [np.zeros((heads, width), dtype=np.int64) for _ in range(destination.num_ranks)]
    for copy in plan:
        assert copy.heads
        assert copy.tokens
        cells = np.s_[copy.heads.start : copy.heads.stop, copy.tokens.start : copy.tokens.stop]
        assert (outbox[copy.source][cells] != 0).all(), f"{copy}: the source does not hold this"
        inbox[copy.destination][cells] = outbox[copy.source][cells]
        arrivals[copy.destination][cells] += 1
    for rank in range(destination.num_ranks):
        rank_heads, rank_tokens = held(destination, rank, tokens)
        expected = np.zeros((heads, width), dtype=np.int64)
        for head in rank_heads:
            expected[head, [token for token in rank_tokens if token in wanted]] = 1
        np.testing.assert_array_equal(arrivals[rank], expected)
        np.testing.assert_array_equal(inbox[rank], truth * expected[:, :, None])


@settings(max_examples=400, deadline=None)
@given(both=sides(), start=st.integers(0, 20), count=st.integers(0, 60), skipped=st.integers(0, 30))
def test_every_element_arrives_once_and_lands_right(
    both: tuple[KvLayout, KvLayout], start: int, count: int, skipped: int
) -> None:
    source, destination = both
    tokens = range(start, start + count)
    wanted = range(min(start + skipped, tokens.stop), tokens.stop)
    plan = plan_reshard(source, destination, tokens, wanted=wanted)
    simulate(source, destination, tokens, wanted, plan)
    needed_bytes = 0
    for rank in range(destination.num_ranks):
        rank_heads, rank_tokens = held(destination, rank, tokens)
        needed_bytes += 2 * len(rank_heads) * sum(token in wanted for token in rank_tokens) * HEAD_DIM * 4
    assert sum(copy.nbytes(source) for copy in plan) == needed_bytes
    assert plan == plan_reshard(source, destination, tokens, wanted=wanted)


@settings(max_examples=300, deadline=None)
@given(both=sides(), count=st.integers(1, 60))
def test_nothing_that_could_go_together_is_cut(both: tuple[KvLayout, KvLayout], count: int) -> None:
    """Between one pair of ranks, no two copies of the same heads touch, nor two of the same tokens."""
    plan = plan_reshard(*both, range(count))
    for first, second in itertools.combinations(plan, 2):
        if (first.source, first.destination) == (second.source, second.destination):
            if first.heads == second.heads:
                assert first.tokens.stop != second.tokens.start
                assert second.tokens.stop != first.tokens.start
            if first.tokens == second.tokens:
                assert first.heads.stop != second.heads.start
                assert second.heads.stop != first.heads.start


@settings(max_examples=200, deadline=None)
@given(
    heads=st.integers(1, 3),
    replicas=st.integers(2, 4),
    tp=st.integers(1, 6),
    cp=st.integers(1, 3),
    count=st.integers(1, 200),
)
def test_replicas_share_the_load(heads: int, replicas: int, tp: int, cp: int, count: int) -> None:
    """Replicas of one head send nearly the same: whole blocks, of which the last may be part full."""
    source = layout(heads=heads, tp=heads * replicas)
    destination = layout(heads=heads, tp=tp, cp=cp)
    sent = [0] * source.num_ranks
    for copy in plan_reshard(source, destination, range(count)):
        sent[copy.source] += len(copy.tokens) * len(copy.heads)
    for head in range(heads):
        loads = [sent[rank] for rank in range(source.tp) if head in source.heads_of(rank)]
        assert max(loads) - min(loads) < 2 * destination.block_size


def test_like_to_like_is_one_copy() -> None:
    side = layout(heads=3)
    [copy] = plan_reshard(side, side, range(100))
    assert copy == Copy(source=0, destination=0, heads=range(3), tokens=range(100))
    assert copy.nbytes(side) == 2 * 3 * 100 * HEAD_DIM * 4


def test_equal_meshes_send_rank_to_rank() -> None:
    side = layout(heads=4, tp=2, cp=2)
    plan = plan_reshard(side, side, range(16))
    assert {(copy.source, copy.destination) for copy in plan} == {(rank, rank) for rank in range(4)}


def test_uneven_heads_meet() -> None:
    """Three heads over two ranks (2 + 1) to three ranks of one head each."""
    plan = plan_reshard(layout(heads=3, tp=2), layout(heads=3, tp=3), range(4))
    assert [(copy.source, copy.destination, copy.heads) for copy in plan] == [
        (0, 0, range(1)),
        (0, 1, range(1, 2)),
        (1, 2, range(2, 3)),
    ]


def test_replicas_split_what_one_destination_wants() -> None:
    plan = plan_reshard(layout(heads=1, tp=4), layout(heads=1), range(64))
    assert [(copy.source, copy.tokens) for copy in plan] == [(n, range(16 * n, 16 * n + 16)) for n in range(4)]


def test_a_few_tokens_are_not_cut_smaller_than_a_block() -> None:
    plan = plan_reshard(layout(heads=1, tp=4), layout(heads=1), range(4))
    assert [copy.tokens for copy in plan] == [range(4)]


@pytest.mark.parametrize(
    ("change", "key"),
    [({"num_layers": 3}, "num_layers"), ({"num_kv_heads": 4}, "num_kv_heads"), ({"head_dim": 4}, "head_dim")],
)
def test_different_models_are_refused_with_both_values(change: dict[str, int], key: str) -> None:
    values = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "block_size": 4}
    source, destination = (KvLayout(dtype="float32", **kwargs) for kwargs in (values, {**values, **change}))
    with pytest.raises(ConfigError, match=rf"kv_layout\.{key}: {values[key]}: the destination has {change[key]}"):
        plan_reshard(source, destination, range(4))


def test_different_dtypes_are_refused_with_both_values() -> None:
    values = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "block_size": 4}
    with pytest.raises(ConfigError, match=r"kv_layout\.dtype: 'float32': the destination has 'bfloat16'"):
        plan_reshard(KvLayout(dtype="float32", **values), KvLayout(dtype="bfloat16", **values), range(4))


# Token placement ----------------------------------------------------------------------------------------


def test_block_cyclic_placement() -> None:
    side = layout(heads=1, cp=3, block_size=4)
    assert tokens_of(side, 0, range(2, 30)) == [range(2, 4), range(12, 16), range(24, 28)]
    assert tokens_of(side, 1, range(2, 30)) == [range(4, 8), range(16, 20), range(28, 30)]
    assert tokens_of(side, 2, range(2, 30)) == [range(8, 12), range(20, 24)]
    assert tokens_of(side, 2, range(0)) == []
    assert tokens_of(layout(heads=1), 0, range(2, 30)) == [range(2, 30)]


@settings(max_examples=200, deadline=None)
@given(both=sides(), start=st.integers(0, 50), count=st.integers(0, 80))
def test_cp_ranks_part_the_tokens(both: tuple[KvLayout, KvLayout], start: int, count: int) -> None:
    side = both[0]
    tokens = range(start, start + count)
    parts = [tokens_of(side, rank, tokens) for rank in range(side.cp)]
    assert sorted(positions([run for runs in parts for run in runs])) == list(tokens)
    for runs in parts:
        assert all(runs)
        assert all(first.stop < second.start for first, second in itertools.pairwise(runs))
