"""The LSE merge in place: what a ring adds its partial results up in. Equal to `merge`, one pass over memory."""

from __future__ import annotations

import torch

# Rows whose float32 copy exists at once: it stays in the cache, and no second result is held.
ROWS_AT_ONCE = 256


class Accumulator:
    """Attention results of some queries over the keys seen so far, in float32.

    Attributes:
        out_THD: normalised; zero where nothing was seen.
        lse_TH: -inf where nothing was seen.
    """

    def __init__(self, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> None:
        self.out_THD = out_THD
        self.lse_TH = lse_TH

    @classmethod
    def like(cls, q_THD: torch.Tensor) -> Accumulator:
        """Of queries that have seen nothing yet."""
        return cls(
            torch.zeros(q_THD.shape, dtype=torch.float32, device=q_THD.device),
            torch.full(q_THD.shape[:2], -torch.inf, dtype=torch.float32, device=q_THD.device),
        )

    def view(self, rows: slice) -> Accumulator:
        """The accumulator of some of the queries, in the same memory."""
        return Accumulator(self.out_THD[rows], self.lse_TH[rows])

    def add(self, rows: slice, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> None:
        """Merge partial results of `rows` over further keys; where `lse` is -inf, `out` must be finite."""
        lse_a, out_a = self.lse_TH[rows], self.out_THD[rows]
        # The weight of the new part is exp(lse_b) / (exp(lse_a) + exp(lse_b)); NaN only where both are empty.
        weight_TH1 = torch.sigmoid(lse_TH - lse_a).nan_to_num_(nan=0.0).unsqueeze(-1)
        for first in range(0, out_THD.shape[0], ROWS_AT_ONCE):
            part = slice(first, first + ROWS_AT_ONCE)
            out_a[part].lerp_(out_THD[part].float(), weight_TH1[part])
        lse_a.copy_(torch.logaddexp(lse_a, lse_TH))
