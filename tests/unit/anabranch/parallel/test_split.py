"""The arithmetic of tensor-parallel shares."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.parallel.layout import KvLayout
from anabranch.parallel.split import check_tp, kv_heads_of, padded_share, query_heads_of, split_range

pytestmark = pytest.mark.unit

sizes = st.integers(1, 12)


@given(total=st.integers(0, 200), size=sizes)
def test_shares_are_contiguous_and_nearly_even(total: int, size: int) -> None:
    shares = [split_range(total, size, rank) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(total))
    lengths = [len(share) for share in shares]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


@given(total=st.integers(1, 200), size=sizes)
def test_padded_shares_cover_everything_once(total: int, size: int) -> None:
    shares = [padded_share(total, size, rank) for rank in range(size)]
    assert [i for _, held in shares for i in held] == list(range(total))
    assert {share for share, _ in shares} == {-(-total // size)}
    assert all(held.start == min(rank * share, total) for rank, (share, held) in enumerate(shares))


@given(num_kv_heads=sizes, group=sizes, tp=sizes)
def test_every_query_head_is_held_once_beside_its_kv_head(num_kv_heads: int, group: int, tp: int) -> None:
    num_heads = num_kv_heads * group
    if tp > num_heads:
        return
    held: list[int] = []
    for rank in range(tp):
        queries = query_heads_of(num_heads, num_kv_heads, tp, rank)
        kv_heads = kv_heads_of(num_kv_heads, tp, rank)
        assert len(queries) > 0
        assert {query // group for query in queries} == set(kv_heads)
        # Kernels pair query heads with KV heads by their counts alone.
        assert len(queries) % len(kv_heads) == 0
        held.extend(queries)
    assert held == list(range(num_heads))


def test_nine_heads_over_two_ranks_go_by_whole_groups() -> None:
    assert [query_heads_of(9, 3, 2, rank) for rank in range(2)] == [range(6), range(6, 9)]
    assert [kv_heads_of(3, 2, rank) for rank in range(2)] == [range(2), range(2, 3)]


def test_nine_heads_over_four_ranks_share_one_kv_head() -> None:
    assert [kv_heads_of(3, 4, rank) for rank in range(4)] == [range(1), range(1), range(1, 2), range(2, 3)]
    assert [len(query_heads_of(9, 3, 4, rank)) for rank in range(4)] == [2, 1, 3, 3]


def test_layout_takes_the_same_shares() -> None:
    layout = KvLayout(dtype="float32", num_layers=2, num_kv_heads=3, head_dim=8, block_size=16, tp=2)
    assert [layout.heads_of(rank) for rank in range(2)] == [range(2), range(2, 3)]


@pytest.mark.parametrize(("tp", "number"), [(10, "9 query heads"), (7, "6 FFN features"), (0, "at least 1")])
def test_what_cannot_be_cut_is_refused_with_the_numbers(tp: int, number: str) -> None:
    with pytest.raises(ConfigError, match=number):
        check_tp(tp, 9, 6)
