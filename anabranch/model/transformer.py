"""A decoder-only transformer of one tensor-parallel rank: both stacks, joined by function calls.

Shape suffixes: T new tokens of all sequences, S sampled rows, C hidden, R rotary dim.
"""

from __future__ import annotations

import torch

from anabranch.model.attention import Attention
from anabranch.model.attention_stack import AttentionStack
from anabranch.model.ffn_half import FfnCalls, T
from anabranch.model.ffn_stack import FfnStack


class Transformer:
    """The forward pass over the weights of one rank.

    Args:
        attention, ffn: of the same model and the same rank.
    """

    def __init__(self, attention: AttentionStack, ffn: FfnStack) -> None:
        self.attention = attention
        self.ffn = ffn

    def run(self, calls: FfnCalls[T]) -> T:
        """Take a pass over the attention stack to its end; each FFN half is a function call."""
        layers = self.ffn.layers
        try:
            call = next(calls)
            while True:
                call = calls.send(layers[call.layer].forward(call.rows))
        except StopIteration as end:
            result: T = end.value
            return result

    @torch.inference_mode()
    def decode(
        self, hidden_TC: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """See `AttentionStack.decode`."""
        return self.run(self.attention.decode(hidden_TC, cos_TR, sin_TR, attention))
