"""The LSE merge: equal to whole attention, associative, at ease with empty parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.kernels.merge import merge

pytestmark = pytest.mark.unit
Part = tuple[torch.Tensor, torch.Tensor]


def attend(scores: torch.Tensor, values: torch.Tensor) -> Part:
    """scores [T, H, C], values [C, H, D]; a part without keys gives -inf and garbage."""
    if scores.shape[-1] == 0:
        return torch.full((*scores.shape[:2], values.shape[-1]), torch.nan), torch.full(scores.shape[:2], -torch.inf)
    return torch.einsum("thc,chd->thd", scores.softmax(-1), values), scores.logsumexp(-1)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=2, max_size=6),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_any_order_of_merges_is_whole_attention(
    sizes: list[int], spread: float, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    scores = torch.randn((3, 2, total), generator=generator) * spread
    values = torch.randn((total, 2, 4), generator=generator)
    parts = [attend(s, v) for s, v in zip(scores.split(sizes, -1), values.split(sizes, 0), strict=True)]
    while len(parts) > 1:
        first = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        second = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts.append(merge(*first, *second))
    out, lse = parts[0]
    if total == 0:
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(lse, torch.full_like(lse, -torch.inf))
        return
    want_out, want_lse = attend(scores, values)
    torch.testing.assert_close(out, want_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_associative() -> None:
    a, b, c = ((torch.randn(5, 3, 8), torch.randn(5, 3) * 10) for _ in range(3))
    left = merge(*merge(*a, *b), *c)
    right = merge(*a, *merge(*b, *c))
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_empty_part_changes_nothing() -> None:
    out, lse = torch.randn(4, 2, 8), torch.randn(4, 2)
    empty = torch.full((4, 2, 8), torch.nan), torch.full((4, 2), -torch.inf)
    for got in (merge(out, lse, *empty), merge(*empty, out, lse)):
        assert torch.equal(got[0], out)
        assert torch.equal(got[1], lse)


def test_result_keeps_the_dtype() -> None:
    out, lse = merge(
        torch.ones(1, 1, 2).bfloat16(), torch.zeros(1, 1), torch.ones(1, 1, 2).bfloat16(), torch.zeros(1, 1)
    )
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert lse.item() == pytest.approx(0.6931472)
