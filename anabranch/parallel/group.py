"""The tensor-parallel group as a model's layers see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


class Group(Protocol):
    """Ranks that hold shards of the same layers and call the same collectives in the same order.

    Attributes:
        rank: this rank, from 0.
        size: number of ranks.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, the same on each; may be computed in x's own memory."""
        ...

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """All ranks' `x`, of one shape, joined along `dim` in rank order."""
        ...


@dataclass(frozen=True, kw_only=True)
class NativeReduce:
    """An all-reduce as a C function, `int function(handle, data, num_elements (uint64), dtype (int))`.

    Attributes:
        function, handle: addresses, valid until the group is closed and safe to use after that.
        dtype: the function's number for the tensor's type.
        error: what a code other than 0 is raised as.
    """

    function: int
    handle: int
    dtype: int
    error: Callable[[int], Exception]


@runtime_checkable
class NativeGroup(Protocol):
    """A group whose sums native code can call for by itself, in the place of `all_reduce`."""

    def native_all_reduce(self, x: torch.Tensor) -> NativeReduce | None:
        """The call that sums tensors like `x` in their own memory; None where there is none for such tensors."""
        ...


class SingleRank:
    """The group of one: its collectives give back what they are given."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return x
