"""Where a context-parallel worker stores KV: block-cyclic over CP ranks, in prefill and in decode alike.

The scheduler plans with *spans*: its block of `cp * block_size` tokens is one block of `block_size` tokens on
every CP rank, under one block id. Block `b` of a sequence's tokens lives on CP rank `b % cp`, so span `s` of
the sequence, with id `block_ids[s]`, holds on rank r the tokens `[(s * cp + r) * block_size, + block_size)`.

What follows from it: where a token is stored is a function of its position and the sequence's block table
alone, whatever chunks it was computed in, so prefix hits and recycled blocks need no record beside the
block table; one allocator on the driver serves all ranks; each rank's pool holds `1 / cp` of the tokens, to
the block; and a rank's own blocks of a sequence, in table order, are its tokens in order of position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class BlockCyclic:
    """Placement of one sequence's tokens on CP ranks.

    A rank numbers the tokens that it holds 0, 1, ... in order of position: their *local index*.

    Attributes:
        block_size: tokens per block of a rank's pool.
        cp: context-parallel degree.
    """

    block_size: int
    cp: int

    @property
    def span(self) -> int:
        """Tokens that one block id stands for: the scheduler's block size."""
        return self.block_size * self.cp

    def owner(self, position: int) -> int:
        """CP rank that stores the token at `position`."""
        return position // self.block_size % self.cp

    def num_local(self, num_tokens: int, rank: int) -> int:
        """How many of a sequence's first `num_tokens` tokens `rank` holds."""
        spans, rest = divmod(num_tokens, self.span)
        return spans * self.block_size + min(max(rest - rank * self.block_size, 0), self.block_size)

    def local_positions(self, tokens: range, rank: int, device: torch.device) -> torch.Tensor:
        """Positions, ascending, of those of `tokens` that `rank` holds: int64."""
        local = self._local(tokens, rank, device)
        return local // self.block_size * self.span + rank * self.block_size + local % self.block_size

    def local_slots(self, tokens: range, rank: int, block_ids: Sequence[int], device: torch.device) -> torch.Tensor:
        """Slots in `rank`'s pool of those of `tokens` that it holds, by position: int64."""
        local = self._local(tokens, rank, device)
        table = torch.tensor(block_ids, dtype=torch.int64, device=device)
        return table[local // self.block_size] * self.block_size + local % self.block_size

    def _local(self, tokens: range, rank: int, device: torch.device) -> torch.Tensor:
        first, stop = self.num_local(tokens.start, rank), self.num_local(max(tokens.start, tokens.stop), rank)
        return torch.arange(first, stop, device=device)
