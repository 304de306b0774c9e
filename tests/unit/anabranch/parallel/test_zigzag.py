"""Zigzag sharding: every token once, balanced, and the last one on rank 0."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.parallel.zigzag import piece, zigzag_share

pytestmark = pytest.mark.unit


@given(start=st.integers(0, 100), count=st.integers(0, 300), cp=st.integers(1, 8))
def test_every_token_is_computed_once(start: int, count: int, cp: int) -> None:
    tokens = range(start, start + count)
    shares = [zigzag_share(tokens, cp, rank) for rank in range(cp)]
    assert sorted(token for share in shares for run in share for token in run) == list(tokens)
    for low, high in shares:
        assert low.stop <= high.start


@given(start=st.integers(0, 100), count=st.integers(1, 300), cp=st.integers(1, 8))
def test_rank_0_has_the_last_token(start: int, count: int, cp: int) -> None:
    _, high = zigzag_share(range(start, start + count), cp, 0)
    assert high[-1] == start + count - 1


@given(count=st.integers(0, 300), cp=st.integers(1, 8))
def test_pieces_differ_by_at_most_one_token(count: int, cp: int) -> None:
    sizes = [len(piece(range(count), cp, index)) for index in range(2 * cp)]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
def test_causal_work_is_even(cp: int) -> None:
    count = 2 * cp * 50

    def work(rank: int) -> int:
        return sum(position + 1 for run in zigzag_share(range(count), cp, rank) for position in run)

    assert {work(rank) for rank in range(cp)} == {count * (count + 1) // 2 // cp}
