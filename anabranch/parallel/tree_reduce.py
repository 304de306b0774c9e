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

from typing import Protocol

import torch

from anabranch.parallel.exchange import Exchange
from anabranch.parallel.group import Group
from anabranch.parallel.partial import LOWEST, combine, pack, packed_shape, unpack
from anabranch.parallel.tree_schedule import tree_moves


class Reduction(Protocol):
    def reduce(self, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge the ranks' partial results of the same queries over disjoint keys.

        Args:
            out_THD: any floating dtype; finite also where `lse` is -inf.
            lse_TH: float32; -inf where this rank's shard holds no key that the query sees.

        Returns:
            `(out, lse)` in float32, bit for bit the same on every rank.
        """
        ...


class _Buffers:
    """Receive buffers `[P, T, H, 2 + D]` in the exchange's fastest memory, kept while the shape stays."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._kept: dict[int, torch.Tensor] = {}

    def get(self, key: int, num_parts: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        wanted = (num_parts, *shape)
        buffer = self._kept.get(key)
        if buffer is None or buffer.shape != wanted:
            like = torch.empty(wanted, dtype=torch.float32, device=device)
            buffer = self._kept[key] = self._exchange.buffer_like(like)
        return buffer


class TreeReduction:
    """Recursive doubling; a sum of two is always taken in rank order, so partners get the same bits.

    Args:
        ranks_per_host: consecutive ranks that share a host, for a tree on two levels.

    Source: Tree Attention (Shyam et al. 2024), algorithm 3, its three all-reduces packed into one.
    """

    def __init__(self, exchange: Exchange, ranks_per_host: int | None = None) -> None:
        self._exchange = exchange
        self._moves = tree_moves(exchange.size, exchange.rank, ranks_per_host)
        self._buffers = _Buffers(exchange)

    def reduce(self, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Reduction.reduce`."""
        rank, shape = self._exchange.rank, packed_shape(out_THD)
        pairs = [self._buffers.get(i, 2, shape, out_THD.device) for i in range(len(self._moves) + 1)]
        # The lower rank's part comes first; where this rank's sum lies depends on whom it meets next.
        places = [int(move.peer < rank) for move in self._moves] + [0]
        total = pairs[0][places[0]]
        pack(out_THD, lse_TH, total)
        for i, move in enumerate(self._moves):
            theirs = pairs[i][1 - places[i]]
            send = [total] if move.kind in ("swap", "give") else []
            receive = [] if move.kind == "give" else [theirs]
            self._exchange.post(send, move.peer, receive, move.peer).wait()
            following = pairs[i + 1][places[i + 1]]
            if move.kind in ("swap", "add"):
                combine(pairs[i], following)
            else:
                following.copy_(theirs if move.kind == "take" else total)
            total = following
        return unpack(total)


class ScatterReduction:
    """Each rank adds up its share of the (token, head) rows and gives the result to all: fewest bytes.

    Source: the bound that Tree Attention (2024), section 6.3, counts for an all-reduce.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._buffers = _Buffers(exchange)

    def reduce(self, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Reduction.reduce`."""
        exchange, rank, size = self._exchange, self._exchange.rank, self._exchange.size
        packed = self._buffers.get(0, 1, packed_shape(out_THD), out_THD.device)[0]
        pack(out_THD, lse_TH, packed)
        rows = packed.flatten(0, 1)
        cuts = [rows.shape[0] * i // size for i in range(size + 1)]
        mine = slice(cuts[rank], cuts[rank + 1])
        shape = (cuts[rank + 1] - cuts[rank], 1, rows.shape[1])
        parts = self._buffers.get(1, size, shape, rows.device)
        parts[rank] = rows[mine].unsqueeze(1)
        others = [(rank + step) % size for step in range(1, size)]
        handles = [
            exchange.post(_some(rows[cuts[to] : cuts[to + 1]]), to, _some(parts[source]), source)
            for to, source in zip(others, reversed(others), strict=True)
        ]
        for handle in handles:
            handle.wait()
        combine(parts, rows[mine].unsqueeze(1))
        handles = [
            exchange.post(_some(rows[mine]), to, _some(rows[cuts[source] : cuts[source + 1]]), source)
            for to, source in zip(others, reversed(others), strict=True)
        ]
        for handle in handles:
            handle.wait()
        return unpack(packed)


class RingReduction:
    """Parts travel a ring of `P - 1` rounds; each rank adds all of them up in rank order."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._buffers = _Buffers(exchange)

    def reduce(self, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Reduction.reduce`."""
        rank, size = self._exchange.rank, self._exchange.size
        parts = self._buffers.get(0, size, packed_shape(out_THD), out_THD.device)
        pack(out_THD, lse_TH, parts[rank])
        for step in range(size - 1):
            travelling, incoming = (rank - step) % size, (rank - step - 1) % size
            self._exchange.post([parts[travelling]], (rank + 1) % size, [parts[incoming]], (rank - 1) % size).wait()
        return _sum(parts)


class GatherReduction:
    """Every rank sends its part to every other at once; each adds all of them up in rank order."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._buffers = _Buffers(exchange)

    def reduce(self, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Reduction.reduce`."""
        rank, size = self._exchange.rank, self._exchange.size
        parts = self._buffers.get(0, size, packed_shape(out_THD), out_THD.device)
        pack(out_THD, lse_TH, parts[rank])
        others = [(rank + step) % size for step in range(1, size)]
        handles = [
            self._exchange.post([parts[rank]], to, [parts[source]], source)
            for to, source in zip(others, reversed(others), strict=True)
        ]
        for handle in handles:
            handle.wait()
        return _sum(parts)


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


def _sum(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.empty_like(parts[0])
    combine(parts, total)
    return unpack(total)


def _some(rows: torch.Tensor) -> list[torch.Tensor]:
    """What to post of `rows`: nothing, where both ends know that there is nothing."""
    return [rows] if rows.numel() else []
