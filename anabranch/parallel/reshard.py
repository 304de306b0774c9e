"""From where a KV cache was computed to where it will be read: which rank sends what to which.

A plan is the same for every layer, and a pure function of the two layouts and the tokens. Each destination rank
gets each of its elements exactly once, from a rank that holds it; where several source ranks hold the same heads
(replicas), the tokens are dealt out among them evenly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from anabranch.errors import ConfigError
from anabranch.parallel.layout import KvLayout
from anabranch.parallel.split import split_range

_MUST_AGREE = ("num_layers", "num_kv_heads", "head_dim", "dtype")


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """One rectangle of heads and tokens that goes from one rank to another, in every layer.

    Attributes:
        source, destination: ranks in their worker, `cp_rank * tp + tp_rank`.
        heads: KV heads, by their number in the whole model.
        tokens: positions in the sequence.
    """

    source: int
    destination: int
    heads: range
    tokens: range

    def nbytes(self, layout: KvLayout) -> int:
        """Bytes of K and V, of one layer."""
        return 2 * len(self.heads) * len(self.tokens) * layout.head_dim * layout.element_bytes


def tokens_of(layout: KvLayout, cp_rank: int, tokens: range) -> list[range]:
    """Which of a run of positions a CP rank holds: ascending, not empty, no two adjacent."""
    if not tokens:
        return []
    if layout.cp == 1:
        return [tokens]
    size = layout.block_size
    first_block = tokens.start // size
    first_block += (cp_rank - first_block) % layout.cp
    blocks = range(first_block, (tokens.stop - 1) // size + 1, layout.cp)
    return _joined(range(max(b * size, tokens.start), min((b + 1) * size, tokens.stop)) for b in blocks)


def plan_reshard(
    source: KvLayout,
    destination: KvLayout,
    tokens: range,
    *,
    wanted: range | None = None,
    source_rank: int | None = None,
) -> tuple[Copy, ...]:
    """The copies that bring `tokens` from every source rank to every destination rank.

    Args:
        tokens: positions.
        wanted: of these, the ones to be sent; None: all. A destination that holds a prefix wants the rest.
        source_rank: plan what this rank sends alone; None: what all do.

    Returns:
        Copies sorted by source, destination, heads and tokens; for each pair of ranks and heads the token
        ranges are as long as the layouts allow.

    Raises:
        ConfigError: the two sides serve different models; names the key and both sides' values.
    """
    for key in _MUST_AGREE:
        ours, theirs = getattr(source, key), getattr(destination, key)
        if ours != theirs:
            raise ConfigError(
                f"kv_layout.{key}", ours, f"the destination has {theirs!r}; both sides must serve the same model"
            )
    # What each group of replicas is asked for: (CP rank, TP ranks that hold the heads, heads) -> demands.
    demands: dict[tuple[int, tuple[int, ...], range], list[tuple[int, range]]] = defaultdict(list)
    held = [tokens_of(source, cp_rank, tokens) for cp_rank in range(source.cp)]
    segments = [_segments(source, destination.heads_of(tp_rank)) for tp_rank in range(destination.tp)]
    for cp_rank in range(destination.cp):
        needed = tokens_of(destination, cp_rank, tokens)
        if wanted is not None:
            needed = _intersections(needed, [wanted])
        for source_cp, holds in enumerate(held):
            if source_rank is not None and source_cp != source_rank // source.tp:
                continue
            runs = _intersections(holds, needed)
            for tp_rank in range(destination.tp):
                rank = cp_rank * destination.tp + tp_rank
                for owners, heads in segments[tp_rank]:
                    if source_rank is not None and source_rank % source.tp not in owners:
                        continue
                    demands[source_cp, owners, heads].extend((rank, run) for run in runs)
    copies = [
        Copy(source=source_cp * source.tp + owner, destination=rank, heads=heads, tokens=run)
        for (source_cp, owners, heads), asked in demands.items()
        for owner, rank, run in _deal(asked, owners, destination.block_size)
        if source_rank is None or owner == source_rank % source.tp
    ]
    copies.sort(key=lambda c: (c.source, c.destination, c.heads.start, c.tokens.start))
    return tuple(copies)


def _segments(source: KvLayout, heads: range) -> list[tuple[tuple[int, ...], range]]:
    """`heads` cut where the set of source TP ranks that hold them changes: (those ranks, heads)."""
    segments: list[tuple[tuple[int, ...], range]] = []
    for head in heads:
        owners = tuple(rank for rank in range(source.tp) if head in source.heads_of(rank))
        if segments and segments[-1][0] == owners:
            segments[-1] = (owners, range(segments[-1][1].start, head + 1))
        else:
            segments.append((owners, range(head, head + 1)))
    return segments


def _deal(
    asked: Sequence[tuple[int, range]], owners: Sequence[int], block_size: int
) -> Iterable[tuple[int, int, range]]:
    """Deal demands out among replicas, an even share of tokens each: (owner, destination rank, tokens).

    Shares are whole numbers of blocks, so that what is small is not cut smaller.
    """
    num_blocks = -(-sum(len(run) for _, run in asked) // block_size)
    place = room = 0
    for rank, run in asked:
        while run:
            if room == 0:
                room = len(split_range(num_blocks, len(owners), place)) * block_size
                place += 1
            taken, run = run[:room], run[room:]
            room -= len(taken)
            yield owners[place - 1], rank, taken


def _joined(runs: Iterable[range]) -> list[range]:
    """Ascending runs without the empty ones, adjacent ones made one."""
    joined: list[range] = []
    for run in runs:
        if joined and run and joined[-1].stop == run.start:
            joined[-1] = range(joined[-1].start, run.stop)
        elif run:
            joined.append(run)
    return joined


def _intersections(left: Sequence[range], right: Sequence[range]) -> list[range]:
    """Where two ascending lists of runs overlap, in one pass."""
    overlaps: list[range] = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, stop = max(left[i].start, right[j].start), min(left[i].stop, right[j].stop)
        if start < stop:
            overlaps.append(range(start, stop))
        if left[i].stop < right[j].stop:
            i += 1
        else:
            j += 1
    return overlaps
