"""The expert that every token of a sparse layer passes, beside those that it chooses.

Shape suffixes: T tokens, C hidden.
"""

from __future__ import annotations

import torch

from anabranch.kernels.base import Kernels
from anabranch.model.ffn_half import DenseFfn
from anabranch.model.loader import WeightLoader
from anabranch.parallel.group import Group


class SharedExpert:
    """An FFN whose answer is scaled by a gate of its own; needs nothing but the rows that the chosen experts get.

    Args:
        layer: a sparse one of a model with shared experts.
        reduce: whether `forward` sums over the ranks; a caller that adds more partial sums does it once itself.
    """

    def __init__(
        self, loader: WeightLoader, kernels: Kernels, group: Group, layer: int, *, reduce: bool = True
    ) -> None:
        moe = loader.config.moe
        assert moe is not None
        prefix = f"model.layers.{layer}.mlp"
        self.ffn = DenseFfn(
            loader,
            kernels,
            group,
            f"{prefix}.shared_expert",
            moe.shared_expert_intermediate,
            bias=False,
            reduce=reduce,
        )
        self.gate_1C = loader.whole(f"{prefix}.shared_expert_gate.weight", 1, loader.config.hidden_size)
        self._linear = kernels.linear

    def forward(self, normed_TC: torch.Tensor) -> torch.Tensor:
        """`[T, C] -> [T, C]`, to be added to what the chosen experts answer."""
        return torch.sigmoid(self._linear(normed_TC, self.gate_1C, None)) * self.ffn.compute(normed_TC)


def has_shared_expert(loader: WeightLoader, layer: int) -> bool:
    """Whether a layer has an expert that every token passes."""
    moe = loader.config.moe
    return moe is not None and moe.sparse_layers[layer] and moe.shared_expert_intermediate > 0
