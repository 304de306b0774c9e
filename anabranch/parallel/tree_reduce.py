"""Ways to add partial attention results of CP ranks up, so that every rank ends with the same bits.

With P ranks and n bytes of one packed part (`T * H * (2 + D) * 4`):

    way       rounds            bytes sent by the busiest rank
    tree      log2(P)           log2(P) * n                  fewest rounds: what decode uses
    scatter   2                 2 * (P - 1) / P * n          fewest bytes: large batches
    ring      P - 1             (P - 1) * n                  baseline
    gather    1                 (P - 1) * n                  baseline
    group     2 collectives     by the group                 baseline: max first, then sums

The tree takes two rounds more where P is no power of two. A reduction object belongs to one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch

from anabranch.parallel.exchange import Exchange
from anabranch.parallel.group import Group
from anabranch.parallel.partial import LOWEST, Packed, Parts, make_parts, packed_shape
from anabranch.parallel.tree_schedule import tree_moves


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


class _Buffers:
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

    Args:
        ranks_per_host: consecutive ranks that share a host, for a tree on two levels.

    Source: Tree Attention (Shyam et al. 2024), algorithm 3, its three all-reduces packed into one.
    """

    def __init__(self, exchange: Exchange, ranks_per_host: int | None = None) -> None:
        self._exchange = exchange
        self._moves = tree_moves(exchange.size, exchange.rank, ranks_per_host)
        # The lower rank's part comes first; where this rank's sum lies depends on whom it meets next.
        self._places = [int(move.peer < exchange.rank) for move in self._moves] + [0]
        self._buffers = _Buffers(exchange, [2] * len(self._places))

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


class ScatterReduction:
    """Each rank adds up its share of the (token, head) rows and gives the result to all: fewest bytes.

    Source: the bound that Tree Attention (2024), section 6.3, counts for an all-reduce.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def reduce(self, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Reduction.reduce`."""
        rank, size = self._exchange.rank, self._exchange.size
        [packed] = make_parts(1, out_THD).parts
        packed.pack(out_THD, lse_TH)
        rows = packed.whole.flatten(0, 1).unsqueeze(1)
        cuts = [rows.shape[0] * i // size for i in range(size + 1)]
        shares = [rows[start:stop] for start, stop in pairwise(cuts)]
        mine = self._exchange.buffer_like(torch.empty((size, *shares[rank].shape), device=rows.device))
        mine[rank] = shares[rank]
        _swap_with_all(self._exchange, shares, list(mine))
        Parts(mine).combine(Packed(shares[rank]))
        _swap_with_all(self._exchange, [shares[rank]] * size, shares)
        return packed.unpack()


class RingReduction:
    """Parts travel a ring of `P - 1` rounds; each rank adds all of them up in rank order."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._buffers = _Buffers(exchange, (exchange.size, 1))

    def reduce(self, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Reduction.reduce`."""
        rank, size = self._exchange.rank, self._exchange.size
        all_ranks, total = self._buffers.like(out_THD)
        parts = all_ranks.parts
        parts[rank].pack(out_THD, lse_TH)
        for step in range(size - 1):
            travelling, incoming = parts[(rank - step) % size].whole, parts[(rank - step - 1) % size].whole
            self._exchange.post([travelling], (rank + 1) % size, [incoming], (rank - 1) % size).wait()
        all_ranks.combine(total.parts[0])
        return total.parts[0].unpack()


class GatherReduction:
    """Every rank sends its part to every other at once; each adds all of them up in rank order."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._buffers = _Buffers(exchange, (exchange.size, 1))

    def reduce(self, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Reduction.reduce`."""
        rank, size = self._exchange.rank, self._exchange.size
        all_ranks, total = self._buffers.like(out_THD)
        parts = all_ranks.parts
        parts[rank].pack(out_THD, lse_TH)
        _swap_with_all(self._exchange, [parts[rank].whole] * size, [part.whole for part in parts])
        all_ranks.combine(total.parts[0])
        return total.parts[0].unpack()


class GroupReduction:
    """Two collectives of a group: the LSEs of all ranks first, then one sum of rescaled parts.

    What a library's all-reduce (NCCL, Gloo) can do: its operator is a plain sum, so the maximum goes first.
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def reduce(self, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Reduction.reduce`."""
        max_TH = self._group.all_gather(lse_TH.unsqueeze(0), 0).amax(0)
        weight_TH1 = (lse_TH - max_TH.clamp(min=LOWEST)).exp_().unsqueeze(-1)
        sums = self._group.all_reduce(torch.cat([weight_TH1, out_THD.float() * weight_TH1], -1))
        sum_TH = sums[..., 0]
        return sums[..., 1:] / sum_TH.clamp(min=1.0).unsqueeze(-1), max_TH + sum_TH.log()


def _swap_with_all(exchange: Exchange, send: Sequence[torch.Tensor], receive: Sequence[torch.Tensor]) -> None:
    """Send `send[r]` to every other rank r and receive `receive[r]` from it, all at once; empty ones stay."""
    rank, size = exchange.rank, exchange.size
    handles = []
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        outgoing, incoming = ([x] if x.numel() else [] for x in (send[to], receive[source]))
        handles.append(exchange.post(outgoing, to, incoming, source))
    for handle in handles:
        handle.wait()
