"""The attention that a model's layers are given: over a paged cache, a ring, a tree, or plain memory."""

from __future__ import annotations

from typing import Protocol

import torch


class Attention(Protocol):
    """Keeps K and V and attends over them. One object serves one forward pass.

    Shape suffixes: T tokens, H query heads and K KV heads of this rank, D head dim.
    """

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal attention of the step's new tokens over their sequences' contexts, these tokens included.

        Args:
            v_TKD: a view whose rows may lie apart, as the merged projection left them; q and k are turned.
            scale: factor on the scores.
            window: tokens that a token sees, itself included; None: all before it.

        Returns:
            `(out [T, H, D] in q's dtype, lse [T, H] float32, natural log)`.
        """
        ...
