"""The expert that every token of a sparse layer passes, beside those that it chooses.

Shape suffixes: T tokens, C hidden.
"""

from __future__ import annotations

import torch

from anabranch.kernels.base import Kernels, Products
from anabranch.model.ffn_half import DenseFfn
from anabranch.model.loader import WeightLoader
from anabranch.parallel.group import Group


class SharedGate:
    """How much of the shared expert's answer a token takes."""

    def __init__(self, loader: WeightLoader, kernels: Kernels, layer: int) -> None:
        self.weight_1C = loader.whole(
            f"model.layers.{layer}.mlp.shared_expert_gate.weight", 1, loader.config.hidden_size
        )
        self._linear = kernels.linear

    def forward(self, normed_TC: torch.Tensor) -> torch.Tensor:
        """`[T, C] -> [T, 1]`."""
        return torch.sigmoid(self._linear(normed_TC, self.weight_1C, None))


class SharedExpert:
    """An FFN whose answer is scaled by a gate of its own; needs nothing but the rows that the chosen experts get.

    Args:
        layer: a sparse one of a model with shared experts.
        reduce: whether `forward` sums over the ranks; a caller that adds more partial sums does it once itself.
    """

    def __init__(
        self, loader: WeightLoader, kernels: Kernels, group: Group, layer: int, *, reduce: bool = True
    ) -> None:
        self.ffn = shared_ffn(loader, kernels, group, layer, reduce=reduce)
        self.gate = SharedGate(loader, kernels, layer)

    def forward(self, normed_TC: torch.Tensor) -> torch.Tensor:
        """`[T, C] -> [T, C]`, to be added to what the chosen experts answer."""
        return self.gate.forward(normed_TC) * self.ffn.compute(normed_TC)


def shared_ffn(loader: WeightLoader, products: Products, group: Group, layer: int, *, reduce: bool) -> DenseFfn:
    """A sparse layer's shared expert without its gate."""
    moe = loader.config.moe
    assert moe is not None
    prefix = f"model.layers.{layer}.mlp.shared_expert"
    return DenseFfn(loader, products, group, prefix, moe.shared_expert_intermediate, bias=False, reduce=reduce)


def has_shared_expert(loader: WeightLoader, layer: int) -> bool:
    """Whether a layer has an expert that every token passes."""
    moe = loader.config.moe
    return moe is not None and moe.sparse_layers[layer] and moe.shared_expert_intermediate > 0
