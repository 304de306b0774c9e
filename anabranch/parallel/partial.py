"""Partial attention as it travels in decode: `(max, denominator, numerator)` of each query row, in one tensor.

A packed part is float32 `[T, H, 2 + D]`: `[..., 0]` the maximum score m, `[..., 1]` the sum d of `exp(score - m)`,
and `[..., 2:]` the sum n of `exp(score - m) * v`. Attention is `n / d`, its LSE `m + log(d)`. A part that saw no
key has m = -inf and d = n = 0.

Shape suffixes: T tokens, H heads, D head dim, P parts.
"""

from __future__ import annotations

import torch

# Below every score: subtracting it instead of -inf makes the weights of parts without keys 0 and not NaN.
LOWEST = -1e30


def packed_shape(out_THD: torch.Tensor) -> tuple[int, int, int]:
    """Shape of the packed part of a result."""
    num_tokens, num_heads, head_dim = out_THD.shape
    return num_tokens, num_heads, head_dim + 2


def pack(out_THD: torch.Tensor, lse_TH: torch.Tensor, packed: torch.Tensor) -> None:
    """Write a partial result into `packed`; where `lse` is -inf, `out` must be finite."""
    packed[..., 0] = lse_TH
    packed[..., 1] = lse_TH > -torch.inf
    packed[..., 2:] = out_THD


def combine(parts_P: torch.Tensor, into: torch.Tensor) -> None:
    """Add parts over disjoint keys up, in order: packed `[P, T, H, 2 + D]` into `[T, H, 2 + D]`.

    `parts_P` is used up. The same parts in the same order give the same bits.
    """
    max_PTH = parts_P[..., 0]
    max_TH = max_PTH.amax(0)
    weights_PTH = (max_PTH - max_TH.clamp(min=LOWEST)).exp_()
    sums_P = parts_P[..., 1:].mul_(weights_PTH.unsqueeze(-1))
    total = sums_P[0]
    for part in sums_P[1:]:
        total.add_(part)
    into[..., 0] = max_TH
    into[..., 1:] = total


def unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(out [T, H, D], lse [T, H])`, float32; zeros and -inf where no key was seen."""
    sum_TH = packed[..., 1]
    lse_TH = packed[..., 0] + sum_TH.log()
    # At least one key has weight 1, so a sum below 1 is a sum of nothing.
    return packed[..., 2:] / sum_TH.clamp(min=1.0).unsqueeze(-1), lse_TH
