"""Adds partial attention results of CP ranks up in a tree, so that every rank ends with the same bits.

With P ranks and n bytes of one packed part (`T * H * (2 + D) * 4`): log2(P) rounds (two more where P is no power of
two), in each of which a rank sends n bytes. A reduction object belongs to one rank. `benchmarks.tree` measures it
against other ways to do the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from anabranch.attention.partial import Parts, packed_shape
from anabranch.parallel.exchange import Exchange
from anabranch.parallel.tree_schedule import doubling


class Reduction(Protocol):
    def reduce(self, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge the ranks' partial results of the same queries over disjoint keys.

        Args:
            out_THD: any floating dtype; zero where `lse` is -inf.
            lse_TH: float32; -inf where this rank's shard holds no key that the query sees.

        Returns:
            `(out, lse)` in float32, bit for bit the same on every rank.
        """
        ...


class PartBuffers:
    """Parts in the exchange's fastest memory, kept while the shape of the queries stays."""

    def __init__(self, exchange: Exchange, num_parts: Sequence[int]) -> None:
        self._exchange = exchange
        self._num_parts = num_parts
        self._shape: tuple[torch.device, torch.Size] | None = None
        self._kept: list[Parts] = []

    def like(self, out_THD: torch.Tensor) -> list[Parts]:
        """For each of the numbers of parts asked for, room for as many."""
        shape = (out_THD.device, out_THD.shape)
        if shape != self._shape:
            self._kept = [
                Parts(
                    self._exchange.buffer_like(
                        torch.empty((count, *packed_shape(out_THD)), dtype=torch.float32, device=out_THD.device)
                    )
                )
                for count in self._num_parts
            ]
            self._shape = shape
        return self._kept


class TreeReduction:
    """Recursive doubling; a sum of two is always taken in rank order, so partners get the same bits.

    Source: Tree Attention (Shyam et al. 2024), algorithm 3, its three all-reduces packed into one.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._moves = doubling(exchange.size, exchange.rank)
        # The lower rank's part comes first; where this rank's sum lies depends on whom it meets next.
        self._places = [int(move.peer < exchange.rank) for move in self._moves] + [0]
        self._buffers = PartBuffers(exchange, [2] * len(self._places))

    def reduce(self, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Reduction.reduce`."""
        pairs, places = self._buffers.like(out_THD), self._places
        total = pairs[0].parts[places[0]]
        total.pack(out_THD, lse_TH)
        for i, move in enumerate(self._moves):
            theirs, following = pairs[i].parts[1 - places[i]], pairs[i + 1].parts[places[i + 1]]
            send = [total.whole] if move.kind in ("swap", "give") else []
            receive = [] if move.kind == "give" else [theirs.whole]
            self._exchange.post(send, move.peer, receive, move.peer).wait()
            if move.kind in ("swap", "add"):
                pairs[i].combine(following)
            else:
                following.whole.copy_(theirs.whole if move.kind == "take" else total.whole)
            total = following
        return total.unpack()
