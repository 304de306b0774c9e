"""The second half of a decoder layer: no state, no residual. A dense FFN is one expert that all tokens pass.

Shape suffixes: T tokens, C hidden, F features, S chosen experts of a token.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import torch

from anabranch.kernels.base import Products
from anabranch.model.linear import ColumnParallel, Part, RowParallel, fused
from anabranch.model.loader import WeightLoader
from anabranch.parallel.group import Group
from anabranch.parallel.split import split_range


class FfnInput(NamedTuple):
    """What leaves the attention half: all that an FFN node needs of a token.

    Attributes:
        normed_TC: hidden states after the post-attention norm.
        weights_TS: float32 weights of the chosen experts; None: the layer is dense.
        experts_TS: int64 ids of the chosen experts; None: the layer is dense.
        shared: whether the last choice of each token is the expert that all tokens pass.
    """

    normed_TC: torch.Tensor
    weights_TS: torch.Tensor | None
    experts_TS: torch.Tensor | None
    shared: bool = False


class FfnCall(NamedTuple):
    """What a pass over the attention halves asks of whoever has the FFN halves: `FfnHalf.forward` of a layer."""

    layer: int
    rows: FfnInput


T = TypeVar("T")
FfnCalls: TypeAlias = Generator[FfnCall, torch.Tensor, T]
"""A pass that stops at each FFN half, is sent its answer `[T, C]`, and goes on; at last it returns a `T`."""


class FfnHalf(Protocol):
    def forward(self, rows: FfnInput) -> torch.Tensor:
        """`[T, C]`, the FFN's answer alone: the caller adds the residual."""
        ...


class DenseFfn:
    """Gated FFN: `down(silu(gate(x)) * up(x))`.

    Args:
        prefix: the checkpoint's name up to `gate_proj`, `up_proj` (or `gate_up_proj`) and `down_proj`.
        reduce: whether `forward` sums over the ranks, see `RowParallel`.
    """

    def __init__(
        self,
        loader: WeightLoader,
        kernels: Products,
        group: Group,
        prefix: str,
        num_features: int,
        *,
        bias: bool,
        reduce: bool = True,
    ) -> None:
        num_hidden = loader.config.hidden_size
        held = split_range(num_features, group.size, group.rank)
        parts = [Part(f"{prefix}.{name}", num_features, held) for name in ("gate_proj", "up_proj")]
        if loader.config.fused_projections:
            parts = fused(f"{prefix}.gate_up_proj", parts)
        self.gate_up = ColumnParallel(loader, kernels, parts, num_hidden, bias=bias)
        self.down = RowParallel(
            loader,
            kernels,
            group,
            f"{prefix}.down_proj",
            num_hidden,
            num_features,
            held,
            bias=bias,
            reduce=reduce,
        )
        self._linear_silu_mul = kernels.linear_silu_mul

    def forward(self, rows: FfnInput) -> torch.Tensor:
        """See `FfnHalf.forward`."""
        return self.compute(rows.normed_TC)

    def compute(self, x_TC: torch.Tensor) -> torch.Tensor:
        """`[T, C] -> [T, C]`."""
        gate_up = self.gate_up
        return self.down.forward(self._linear_silu_mul(x_TC, gate_up.weight_FC, gate_up.bias_F))

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        return self.gate_up.num_bytes + self.down.num_bytes


def layer_ffn(loader: WeightLoader, kernels: Products, group: Group, layer: int) -> DenseFfn:
    """A dense layer's FFN."""
    config = loader.config
    prefix = f"model.layers.{layer}.mlp"
    return DenseFfn(loader, kernels, group, prefix, config.intermediate_size, bias=config.mlp_bias)
