"""Partial attention as it travels in decode: `(max, denominator, numerator)` of each query row, in one tensor.

A packed part is float32 `[T, H, 2 + D]`: `[..., 0]` the maximum score m, `[..., 1]` the sum d of `exp(score - m)`,
and `[..., 2:]` the sum n of `exp(score - m) * v`. Attention is `n / d`, its LSE `m + log(d)`. A part that saw no
key has m = LOWEST and d = n = 0.

A decode step does this in every layer, and at its sizes a tensor operation or a view costs more than the
arithmetic: so views are made once, and `combine` is five operations.

Shape suffixes: T tokens, H heads, D head dim, P parts.
"""

from __future__ import annotations

import torch

# Below every score, and finite: of two parts without keys neither weight is NaN.
LOWEST = -1e30


class Packed:
    """One packed part and views of its fields, in memory that may be sent and received.

    Attributes:
        whole: `[T, H, 2 + D]`.
        max_TH, sum_TH, values_THD: m, d and n.
        sums: d and n together, `[T, H, 1 + D]`.
    """

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole = whole
        self.max_TH = whole[..., 0]
        self.sum_TH = whole[..., 1]
        self.values_THD = whole[..., 2:]
        self.sums = whole[..., 1:]

    def pack(self, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> None:
        """Write a partial result here; where `lse` is -inf, `out` must be zero."""
        torch.clamp(lse_TH, min=LOWEST, out=self.max_TH)
        torch.gt(lse_TH, LOWEST, out=self.sum_TH)
        self.values_THD.copy_(out_THD)

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(out [T, H, D], lse [T, H])`, float32; zeros and -inf where no key was seen."""
        # At least one key has weight 1, so a sum below 1 is a sum of nothing.
        out_THD = self.values_THD / self.sum_TH.clamp(min=1.0).unsqueeze(-1)
        return out_THD, self.sum_TH.log().add_(self.max_TH)


class Parts:
    """Several packed parts of the same queries over disjoint keys.

    Attributes:
        parts: in the order in which they are added up.
    """

    def __init__(self, data: torch.Tensor) -> None:
        self.parts = [Packed(whole) for whole in data]
        self._max_PTH = data[..., 0]
        self._sums = data[..., 1:]

    def combine(self, into: Packed) -> None:
        """Add the parts up; uses them up. The same parts in the same order give the same bits.

        `into` may not be one of the parts.
        """
        if len(self.parts) == 2:
            torch.maximum(self.parts[0].max_TH, self.parts[1].max_TH, out=into.max_TH)
        else:
            torch.amax(self._max_PTH, 0, out=into.max_TH)
        weights_PTH = (self._max_PTH - into.max_TH).exp_()
        self._sums.mul_(weights_PTH.unsqueeze_(-1))
        if len(self.parts) == 2:
            torch.add(self.parts[0].sums, self.parts[1].sums, out=into.sums)
        else:
            torch.sum(self._sums, 0, out=into.sums)


def packed_shape(out_THD: torch.Tensor) -> tuple[int, int, int]:
    """Shape of the packed part of a result."""
    num_tokens, num_heads, head_dim = out_THD.shape
    return num_tokens, num_heads, head_dim + 2
