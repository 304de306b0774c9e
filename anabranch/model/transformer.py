"""A decoder-only transformer of one tensor-parallel rank: both stacks, joined by function calls.

Shape suffixes: T new tokens of all sequences, S sampled rows, C hidden, R rotary dim, V vocabulary.
"""

from __future__ import annotations

import torch

from anabranch.model.attention import Attention
from anabranch.model.attention_stack import AttentionStack
from anabranch.model.ffn_stack import FfnStack


class Transformer:
    """The forward pass over the weights of one rank.

    Args:
        attention, ffn: of the same model and the same rank.
    """

    def __init__(self, attention: AttentionStack, ffn: FfnStack) -> None:
        self.attention = attention
        self.ffn = ffn

    @torch.inference_mode()
    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        attention: Attention,
        sample_rows_S: torch.Tensor,
    ) -> torch.Tensor:
        """One pass over a ragged batch.

        Args:
            token_ids_T: int64.
            positions_T: int64, each token's position in its sequence.
            attention: keeps K and V; knows which rows belong to which sequence.
            sample_rows_S: int64, rows whose logits are wanted.

        Returns:
            `[S, V]`, the logits of this rank's share of the vocabulary (`LmHead.share`).
        """
        stack = self.attention
        hidden_TC, answer_TC = self._layers(stack.embed(token_ids_T), *stack.rotary.forward(positions_T), attention)
        return stack.logits(hidden_TC.index_select(0, sample_rows_S), answer_TC.index_select(0, sample_rows_S))

    @torch.inference_mode()
    def decode(
        self, hidden_TC: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """`forward` of embedded rows that are all sampled, by calls of kernels alone: what is recorded."""
        return self.attention.logits(*self._layers(hidden_TC, cos_TR, sin_TR, attention))

    def _layers(
        self, hidden_TC: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, attention: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All layers: the hidden states, and the last FFN's answer that is still to be added."""
        answer_TC: torch.Tensor | None = None
        for first, second in zip(self.attention.layers, self.ffn.layers, strict=True):
            hidden_TC, rows = first.step(hidden_TC, answer_TC, cos_TR, sin_TR, attention)
            answer_TC = second.forward(rows)
        assert answer_TC is not None
        return hidden_TC, answer_TC
