"""The LSE merge in place: what a ring adds its partial results up in. Equal to `merge`, one pass over memory."""

from __future__ import annotations

import torch


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
        weight = torch.sigmoid(lse_TH - lse_a).nan_to_num_(nan=0.0)
        out_a.lerp_(out_THD.float(), weight.unsqueeze(-1))
        lse_a.copy_(torch.logaddexp(lse_a, lse_TH))
