"""Projections, with their sharding beside them. Shape suffixes: T tokens, C input, F output features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from anabranch.kernels.base import Products
from anabranch.model.loader import WeightLoader
from anabranch.parallel.group import Group


@dataclass(frozen=True)
class Part:
    """A checkpoint's projection, of which this rank computes some outputs.

    Attributes:
        name: without `.weight` or `.bias`.
        num_outputs: of the whole tensor of that name.
        rows: outputs computed here.
    """

    name: str
    num_outputs: int
    rows: range


def fused(name: str, parts: Sequence[Part]) -> list[Part]:
    """The same outputs where the checkpoint stores these projections, one after another, as a single one.

    Args:
        name: of the single projection.
    """
    num_outputs = sum(part.num_outputs for part in parts)
    found: list[Part] = []
    start = 0
    for part in parts:
        found.append(Part(name, num_outputs, range(start + part.rows.start, start + part.rows.stop)))
        start += part.num_outputs
    return found


class ColumnParallel:
    """Projections of one input merged into one weight; each rank computes some of every one's outputs."""

    def __init__(
        self, loader: WeightLoader, kernels: Products, parts: Sequence[Part], num_inputs: int, *, bias: bool
    ) -> None:
        num_outputs = sum(len(part.rows) for part in parts)
        self.weight_FC = loader.empty(num_outputs, num_inputs)
        self.bias_F = loader.empty(num_outputs) if bias else None
        self._linear = kernels.linear
        start = 0
        for part in parts:
            stop = start + len(part.rows)
            rows = slice(part.rows.start, part.rows.stop)
            loader.fill(
                self.weight_FC[start:stop], f"{part.name}.weight", (part.num_outputs, num_inputs), (rows, slice(None))
            )
            if self.bias_F is not None:
                loader.fill(self.bias_F[start:stop], f"{part.name}.bias", (part.num_outputs,), (rows,))
            start = stop

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        """`[T, C] -> [T, F of this rank]`, the parts one after another."""
        return self._linear(x_TC, self.weight_FC, self.bias_F)

    @property
    def num_bytes(self) -> int:
        return self.weight_FC.nbytes + (0 if self.bias_F is None else self.bias_F.nbytes)


class RowParallel:
    """A projection whose inputs are spread over the ranks; partial sums are all-reduced.

    Args:
        columns: inputs held here.
        reduce: whether `forward` all-reduces; a caller that adds more partial sums does it once itself.
    """

    def __init__(
        self,
        loader: WeightLoader,
        kernels: Products,
        group: Group,
        name: str,
        num_outputs: int,
        num_inputs: int,
        columns: range,
        *,
        bias: bool,
        reduce: bool = True,
    ) -> None:
        self.weight_FC = loader.empty(num_outputs, len(columns))
        held = (slice(None), slice(columns.start, columns.stop))
        loader.fill(self.weight_FC, f"{name}.weight", (num_outputs, num_inputs), held)
        bias_F = loader.whole(f"{name}.bias", num_outputs) if bias else None
        # The sum over ranks must hold the bias once.
        self.bias_F = bias_F if group.rank == 0 else None
        self._kernels = kernels
        self._group = group if reduce and group.size > 1 else None

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        """`[T, C of this rank] -> [T, F]`, the same on every rank once reduced."""
        out_TF = self._kernels.linear(x_TC, self.weight_FC, self.bias_F)
        return out_TF if self._group is None else self._kernels.all_reduce(out_TF, self._group)

    @property
    def num_bytes(self) -> int:
        return self.weight_FC.nbytes + (0 if self.bias_F is None else self.bias_F.nbytes)
