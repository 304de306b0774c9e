"""Attention over one block: every way gives what the plain one gives."""

from __future__ import annotations

import pytest
import torch

from anabranch.attention.accumulate import Accumulator
from anabranch.kernels.block_attention import attend_block, flash_block, plain_block
from anabranch.kernels.merge import merge
from anabranch.kernels.native import select_kernels
from anabranch.kernels.plain import PlainKernels

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


def draw(num_tokens: int, num_keys: int, dtype: torch.dtype, head_dim: int = 32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_tokens + num_keys)
    shapes = (num_tokens, 6, head_dim), (num_keys, 2, head_dim), (num_keys, 2, head_dim)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 33, 200])
@pytest.mark.parametrize("num_keys", [1, 31, 32, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_every_key_is_seen(num_tokens: int, num_keys: int, dtype: torch.dtype, tolerance: float) -> None:
    for head_dim in (32, 20):
        q, k, v = draw(num_tokens, num_keys, dtype, head_dim)
        want_out, want_lse = plain_block(q.float(), k.float(), v.float(), 0.2)
        results = [
            flash_block(q, k, v, 0.2),
            attend_block(PlainKernels(), q, k, v, 0.2),
            attend_block(select_kernels(CPU, dtype), q, k, v, 0.2),
        ]
        for out, lse in results:
            assert (out.dtype, lse.dtype) == (dtype, torch.float32)
            torch.testing.assert_close(out.float(), want_out, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(lse, want_lse, rtol=tolerance, atol=tolerance)


def test_a_query_that_sees_nothing() -> None:
    q, k, v = draw(3, 4, torch.float32)
    hidden = torch.tensor([[False] * 4, [True] * 4, [True, True, True, False]])
    out, lse = attend_block(PlainKernels(), q, k, v, 0.2, hidden)
    assert torch.equal(out[1], torch.zeros(6, 32))
    assert torch.equal(lse[1], torch.full((6,), -torch.inf))
    torch.testing.assert_close(out[2], v[3].repeat_interleave(3, 0))


def test_adding_up_in_place_is_the_merge() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(4):
        out, lse = torch.randn(5, 3, 8, generator=generator), torch.randn(5, 3, generator=generator) * 20
        empty = torch.rand(5, 3, generator=generator) < 0.4
        empty[0] = True
        parts.append((out.masked_fill(empty.unsqueeze(-1), 0.0), lse.masked_fill(empty, -torch.inf)))
    total, want = Accumulator.like(parts[0][0]), parts[0]
    total.add(slice(0, 5), *parts[0])
    for part in parts[1:]:
        total.add(slice(0, 5), *part)
        want = merge(*want, *part)
    torch.testing.assert_close((total.out_THD, total.lse_TH), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(total.lse_TH[0], torch.full((3,), -torch.inf))
