"""Other ways to add partial attention results up, which the tree is measured against.

With P ranks and n bytes of one packed part:

    way       rounds    bytes sent by the busiest rank
    scatter   2         2 * (P - 1) / P * n               fewest bytes
    gather    1         (P - 1) * n
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from anabranch.attention.partial import Packed, Parts, packed_shape
from anabranch.attention.tree_reduce import PartBuffers
from anabranch.parallel.exchange import Exchange


def num_rounds(size: int) -> int:
    """Rounds of a tree: `log2(size)`, and two more where that is not a whole number."""
    levels = size.bit_length() - 1
    return levels if size == 1 << levels else levels + 2


def make_parts(num_parts: int, out_THD: torch.Tensor) -> Parts:
    """Room for `num_parts` parts of results like `out_THD`."""
    shape = (num_parts, *packed_shape(out_THD))
    return Parts(torch.empty(shape, dtype=torch.float32, device=out_THD.device))


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


class GatherReduction:
    """Every rank sends its part to every other at once; each adds all of them up in rank order."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._buffers = PartBuffers(exchange, (exchange.size, 1))

    def reduce(self, out_THD: torch.Tensor, lse_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Reduction.reduce`."""
        rank, size = self._exchange.rank, self._exchange.size
        all_ranks, total = self._buffers.like(out_THD)
        parts = all_ranks.parts
        parts[rank].pack(out_THD, lse_TH)
        _swap_with_all(self._exchange, [parts[rank].whole] * size, [part.whole for part in parts])
        all_ranks.combine(total.parts[0])
        return total.parts[0].unpack()


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
