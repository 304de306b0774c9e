"""Zigzag sharding: which new tokens of a chunk a context-parallel rank computes.

A chunk is cut into `2 * cp` pieces and rank r computes pieces r and `2 * cp - 1 - r`: one early piece, which
attends to little, and one late piece, which attends to much, so that causal work is even.
"""

from __future__ import annotations


def piece(tokens: range, cp: int, index: int) -> range:
    """Piece `index` of `2 * cp` of consecutive tokens; pieces differ by at most one token and may be empty.

    The last piece is empty only if `tokens` is, so the last token of a chunk is always rank 0's: the rank
    that samples.
    """
    count, parts = len(tokens), 2 * cp
    return range(tokens.start + count * index // parts, tokens.start + count * (index + 1) // parts)


def zigzag_share(tokens: range, cp: int, rank: int) -> tuple[range, range]:
    """The low and the high piece of `tokens` that CP rank `rank` computes; either may be empty.

    Source: Context Parallelism for Scalable Million-Token Inference (2024), section 3.5.1.
    """
    assert 0 <= rank < cp
    return piece(tokens, cp, rank), piece(tokens, cp, 2 * cp - 1 - rank)
