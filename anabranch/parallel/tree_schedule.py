"""Who speaks to whom in a tree reduction: recursive doubling, for any number of ranks, on one or two levels.

Among `2**k` ranks, in round i each swaps its sum with the rank whose number differs in bit i: after k rounds
all hold the sum of all. With `n = 2**k + e` ranks, the last e first give their part to the first e, and get
the sum back at the end: `k + 2` rounds.

On two levels (ranks of one host first, then ranks of the same place in every host) each slow link carries
`log2(hosts)` messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from anabranch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Move:
    """One round of one rank.

    Attributes:
        kind: `swap`: send one's sum, receive the peer's, add up; `give`: send it; `add`: receive and add up;
            `take`: receive what is the sum from now on.
    """

    kind: Literal["swap", "give", "add", "take"]
    peer: int


def doubling(members: Sequence[int], rank: int) -> list[Move]:
    """`rank`'s rounds in a reduction among `members`, after which all of them hold the same sum."""
    place, count = members.index(rank), len(members)
    core = 1 << (count.bit_length() - 1)
    if place >= core:
        partner = members[place - core]
        return [Move(kind="give", peer=partner), Move(kind="take", peer=partner)]
    moves = [Move(kind="swap", peer=members[place ^ (1 << i)]) for i in range(core.bit_length() - 1)]
    if place < count - core:
        partner = members[place + core]
        return [Move(kind="add", peer=partner), *moves, Move(kind="give", peer=partner)]
    return moves


def tree_moves(size: int, rank: int, ranks_per_host: int | None = None) -> list[Move]:
    """`rank`'s rounds in a reduction among `size` ranks.

    Args:
        ranks_per_host: consecutive ranks that share a host; None: one level.

    Raises:
        ConfigError: the hosts hold different numbers of ranks.
    """
    if ranks_per_host is None or ranks_per_host >= size:
        return doubling(range(size), rank)
    if ranks_per_host < 1 or size % ranks_per_host:
        raise ConfigError("ranks_per_host", ranks_per_host, f"must divide the {size} CP ranks")
    first = rank // ranks_per_host * ranks_per_host
    within = doubling(range(first, first + ranks_per_host), rank)
    between = doubling(range(rank % ranks_per_host, size, ranks_per_host), rank)
    return within + between


def num_rounds(size: int) -> int:
    """Rounds of a one-level tree: `log2(size)`, and two more where that is not a whole number."""
    levels = size.bit_length() - 1
    return levels if size == 1 << levels else levels + 2
