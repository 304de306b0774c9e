"""The second halves of all layers on one rank."""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.kernels.base import Kernels
from anabranch.model.ffn_half import DenseFfn, FfnHalf
from anabranch.model.loader import WeightLoader
from anabranch.model.moe import MoeFfn
from anabranch.parallel.group import Group


class FfnStack:
    """Dense FFNs and experts; the weights of one rank.

    Args:
        loader: only this rank's slices of these tensors are read.
        group: ranks that the weights are sharded over.
        experts: ids of the experts of each sparse layer that are held; None: all.
    """

    def __init__(
        self, loader: WeightLoader, kernels: Kernels, group: Group, experts: Sequence[int] | None = None
    ) -> None:
        config = loader.config
        self.layers: list[FfnHalf] = []
        for layer in range(config.num_layers):
            if config.is_sparse(layer):
                self.layers.append(MoeFfn(loader, kernels, group, layer, experts))
            else:
                prefix = f"model.layers.{layer}.mlp"
                self.layers.append(
                    DenseFfn(loader, kernels, group, prefix, config.intermediate_size, bias=config.mlp_bias)
                )
            loader.part_done()
