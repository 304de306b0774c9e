"""Which rank sends to which in a tree reduction: recursive doubling, for any number of ranks.

Among `2**k` ranks, in round i each swaps its sum with the rank whose number differs in bit i: after k rounds
all hold the sum of all. With `n = 2**k + e` ranks, the last e first give their part to the first e, and get
the sum back at the end: `k + 2` rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Move:
    """One round of one rank.

    Attributes:
        kind: `swap`: send one's sum, receive the peer's, add up; `give`: send it; `add`: receive and add up;
            `take`: receive what is the sum from now on.
    """

    kind: Literal["swap", "give", "add", "take"]
    peer: int


def doubling(size: int, rank: int) -> list[Move]:
    """`rank`'s rounds in a reduction among `size` ranks, after which all of them hold the same sum."""
    core = 1 << (size.bit_length() - 1)
    if rank >= core:
        partner = rank - core
        return [Move(kind="give", peer=partner), Move(kind="take", peer=partner)]
    moves = [Move(kind="swap", peer=rank ^ (1 << i)) for i in range(core.bit_length() - 1)]
    if rank < size - core:
        partner = rank + core
        return [Move(kind="add", peer=partner), *moves, Move(kind="give", peer=partner)]
    return moves
