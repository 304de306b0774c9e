"""How heads, features and vocabulary are dealt out to tensor-parallel ranks: arithmetic only."""

from __future__ import annotations

from anabranch.errors import ConfigError


def split_range(total: int, size: int, rank: int) -> range:
    """Rank's contiguous, nearly even share of `range(total)`; the first ranks are larger by one."""
    share, rest = divmod(total, size)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


def padded_share(total: int, size: int, rank: int) -> tuple[int, range]:
    """Equal shares of `ceil(total / size)`, of which the last ones may be part empty.

    Returns:
        `(share, held)`: every rank's padded share, and the part of `range(total)` that is real here.
    """
    share = -(-total // size)
    start = min(rank * share, total)
    return share, range(start, min(start + share, total))


def kv_heads_of(num_kv_heads: int, tp: int, rank: int) -> range:
    """KV heads that a rank holds: a nearly even split, or one replicated head where `tp` exceeds them."""
    if tp <= num_kv_heads:
        return split_range(num_kv_heads, tp, rank)
    head = next(head for head in range(num_kv_heads) if rank in split_range(tp, num_kv_heads, head))
    return range(head, head + 1)


def query_heads_of(num_heads: int, num_kv_heads: int, tp: int, rank: int) -> range:
    """Query heads that a rank holds: whole KV groups, or part of one group where the KV head is replicated."""
    group = num_heads // num_kv_heads
    kv_heads = kv_heads_of(num_kv_heads, tp, rank)
    if tp <= num_kv_heads:
        return range(kv_heads.start * group, kv_heads.stop * group)
    sharers = split_range(tp, num_kv_heads, kv_heads.start)
    part = split_range(group, len(sharers), rank - sharers.start)
    first = kv_heads.start * group
    return range(first + part.start, first + part.stop)


def check_tp(tp: int, num_heads: int, intermediate_size: int) -> None:
    """Raise ConfigError where a rank would be left without a query head or an FFN feature."""
    if tp < 1:
        raise ConfigError("tp", tp, "must be at least 1")
    for what, count in (("query heads", num_heads), ("FFN features", intermediate_size)):
        if tp > count:
            raise ConfigError("tp", tp, f"must be at most the model's {count} {what}")
