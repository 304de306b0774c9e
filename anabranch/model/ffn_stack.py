"""The second halves of all layers on one rank."""

from __future__ import annotations

from anabranch.kernels.base import Kernels
from anabranch.model.ffn_half import FfnHalf, layer_ffn
from anabranch.model.loader import WeightLoader
from anabranch.model.moe import MoeFfn
from anabranch.parallel.group import Group


class FfnStack:
    """Dense FFNs and experts; the weights of one rank.

    Args:
        loader: only this rank's slices of these tensors are read.
        group: ranks that the weights are sharded over.
    """

    def __init__(self, loader: WeightLoader, kernels: Kernels, group: Group) -> None:
        config = loader.config
        self.layers: list[FfnHalf] = []
        for layer in range(config.num_layers):
            if config.is_sparse(layer):
                self.layers.append(MoeFfn(loader, kernels, group, layer))
            else:
                self.layers.append(layer_ffn(loader, kernels, group, layer))
            loader.part_done()
