"""The tensor-parallel group as a model's layers see it."""

from __future__ import annotations

from typing import Protocol

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


class SingleRank:
    """The group of one: its collectives give back what they are given."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return x
