"""Who holds what in one ring step: every rank's queries and KV shard, and which scores each pair needs.

All ranks derive the same geometry from the same step plan, so no sizes travel. A rank's *rows* are the new
tokens that it computes: of each sequence its low and its high zigzag piece. A rank's *shard* is the KV that
it brings to the ring: of each sequence the cached tokens that it stores, then the rows that it computes;
all three runs lie in order of position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from anabranch.attention.segments import Segment, by_position, rectangle
from anabranch.parallel.placement import BlockCyclic
from anabranch.parallel.zigzag import zigzag_share
from anabranch.step.batch import ForwardBatch
from anabranch.step.plan import StepPlan


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank computes of one sequence.

    Attributes:
        low, high: positions of the two zigzag pieces; either may be empty.
        start: row of the first of them among all the rank's rows.
    """

    low: range
    high: range
    start: int

    @property
    def num_rows(self) -> int:
        return len(self.low) + len(self.high)

    @property
    def middle(self) -> int:
        """First row of the high piece."""
        return self.start + len(self.low)

    @property
    def stop(self) -> int:
        return self.start + self.num_rows


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The KV that one rank brings to the ring.

    Attributes:
        starts: per sequence, row of its first cached token in the shard.
        num_cached: per sequence, cached tokens in the shard; the rank's new ones follow them.
        num_rows: tokens in all.
        fresh_rows_T: int64, for each row that the rank computes its row in the shard.
    """

    starts: tuple[int, ...]
    num_cached: tuple[int, ...]
    num_rows: int
    fresh_rows_T: torch.Tensor


class RingGeometry:
    """One step plan seen as a ring of `placement.cp` ranks; results are kept for the layers to come.

    Args:
        device: of the index tensors.
        share_of: cuts a sequence's new tokens among the ranks.
    """

    def __init__(
        self,
        plan: StepPlan,
        placement: BlockCyclic,
        device: torch.device,
        share_of: Callable[[range, int, int], tuple[range, range]] = zigzag_share,
    ) -> None:
        self.sequences = plan.sequences
        self.placement = placement
        self.device = device
        self._share_of = share_of
        self.shares = tuple(self._shares(rank) for rank in range(placement.cp))
        self._shards: dict[tuple[int, int | None], Shard] = {}
        self._segments: dict[tuple[int, int, int | None], tuple[Segment, ...]] = {}
        self._owned: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._own_batches: dict[int, ForwardBatch] = {}
        self._cached_slots: dict[tuple[int, int, int | None], torch.Tensor] = {}

    @property
    def cp(self) -> int:
        return self.placement.cp

    def num_rows(self, rank: int) -> int:
        """New tokens that `rank` computes."""
        return self.shares[rank][-1].stop

    def positions(self, rank: int) -> torch.Tensor:
        """Position of each of `rank`'s rows: int64."""
        runs = [torch.arange(run.start, run.stop) for share in self.shares[rank] for run in (share.low, share.high)]
        return torch.cat(runs).to(self.device)

    def cached(self, index: int, window: int | None) -> range:
        """Cached tokens of sequence `index` that some new token of this step sees."""
        start = self.sequences[index].start
        return range(0 if window is None else min(max(start - window + 1, 0), start), start)

    def cached_slots(self, rank: int, index: int, window: int | None) -> torch.Tensor:
        """Slots in `rank`'s pool of sequence `index`'s cached tokens in its shard: int64."""
        key = (rank, index, window)
        if key not in self._cached_slots:
            self._cached_slots[key] = self.placement.local_slots(
                self.cached(index, window), rank, self.sequences[index].block_ids, self.device
            )
        return self._cached_slots[key]

    def shard(self, rank: int, window: int | None) -> Shard:
        """The KV that `rank` brings to the ring of a layer with this window."""
        key = (rank, window)
        if key not in self._shards:
            self._shards[key] = self._make_shard(rank, window)
        return self._shards[key]

    def owned(self, source: int, owner: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the rows that `source` computes, those whose KV `owner` stores, and the slots in its pool: int64."""
        key = (source, owner)
        if key not in self._owned:
            self._owned[key] = self._make_owned(source, owner)
        return self._owned[key]

    def own_batch(self, rank: int) -> ForwardBatch:
        """`rank`'s rows over its own shard, as paged attention without a window sees them.

        A rank's own tokens of a sequence are its context: they lie in order of position, the new ones last, so
        what is causal among them is causal in the sequence. Each row of the shard is a block of one token.
        """
        if rank not in self._own_batches:
            self._own_batches[rank] = self._make_own_batch(rank)
        return self._own_batches[rank]

    def segments(self, q_rank: int, kv_rank: int, window: int | None) -> tuple[Segment, ...]:
        """The scores of `q_rank`'s rows over `kv_rank`'s shard that causality and the window leave.

        Without a window a rank's own shard is not among them: that is `own_batch`.
        """
        key = (q_rank, kv_rank, window)
        if key not in self._segments:
            make = self._whole if window is None else self._windowed
            self._segments[key] = tuple(
                segment for index in range(len(self.sequences)) for segment in make(index, q_rank, kv_rank, window)
            )
        return self._segments[key]

    def _shares(self, rank: int) -> tuple[Share, ...]:
        shares, start = [], 0
        for sequence in self.sequences:
            low, high = self._share_of(range(sequence.start, sequence.context_len), self.cp, rank)
            shares.append(Share(low=low, high=high, start=start))
            start = shares[-1].stop
        return tuple(shares)

    def _make_shard(self, rank: int, window: int | None) -> Shard:
        starts, num_cached, fresh, total = [], [], [], 0
        for index, share in enumerate(self.shares[rank]):
            visible = self.cached(index, window)
            count = self.placement.num_local(visible.stop, rank) - self.placement.num_local(visible.start, rank)
            starts.append(total)
            num_cached.append(count)
            total += count
            fresh.append(torch.arange(total, total + share.num_rows))
            total += share.num_rows
        return Shard(
            starts=tuple(starts),
            num_cached=tuple(num_cached),
            num_rows=total,
            fresh_rows_T=torch.cat(fresh).to(self.device),
        )

    def _make_own_batch(self, rank: int) -> ForwardBatch:
        shard = self.shard(rank, None)
        parts = [
            (first, num_cached + share.num_rows, share.stop)
            for first, num_cached, share in zip(shard.starts, shard.num_cached, self.shares[rank], strict=True)
            if share.num_rows
        ]
        starts = (0, *(stop for _, _, stop in parts))
        lens = tuple(count for _, count, _ in parts)
        firsts_B1 = torch.tensor([first for first, _, _ in parts], dtype=torch.int32).unsqueeze(1)
        # Padding at the end of a row may name rows beyond the sequence's; they lie beyond its context as well.
        tables_BN = (firsts_B1 + torch.arange(max(lens, default=0), dtype=torch.int32)).clamp(max=shard.num_rows - 1)
        empty = torch.empty(0, dtype=torch.int64, device=self.device)
        return ForwardBatch(
            token_ids_T=empty,
            positions_T=empty,
            slots_T=empty,
            query_starts=starts,
            context_lens=lens,
            query_starts_B1=torch.tensor(starts, dtype=torch.int32).to(self.device),
            context_lens_B=torch.tensor(lens, dtype=torch.int32).to(self.device),
            block_tables_BN=tables_BN.to(self.device),
            sample_rows_S=empty,
        )

    def _make_owned(self, source: int, owner: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows, slots = [], []
        for sequence, share in zip(self.sequences, self.shares[source], strict=True):
            for run, first in ((share.low, share.start), (share.high, share.middle)):
                positions = self.placement.local_positions(run, owner, self.device)
                rows.append(positions - run.start + first)
                slots.append(self.placement.local_slots(run, owner, sequence.block_ids, self.device))
        return torch.cat(rows), torch.cat(slots)

    def _whole(self, index: int, q_rank: int, kv_rank: int, window: int | None) -> list[Segment]:
        """Without a window a piece of queries sees a prefix of another rank's shard, and all of it whole."""
        if q_rank == kv_rank:
            return []
        q, kv, shard = self.shares[q_rank][index], self.shares[kv_rank][index], self.shard(kv_rank, window)
        first = shard.starts[index]
        fresh = first + shard.num_cached[index]

        def older(queries: range) -> slice:
            """The cached tokens and the pieces before `queries`: pieces of two ranks never overlap."""
            return slice(first, fresh + sum(len(run) for run in (kv.low, kv.high) if run.stop <= queries.start))

        if older(q.low) == older(q.high):
            return rectangle(slice(q.start, q.stop), older(q.low))
        return [
            *rectangle(slice(q.start, q.middle), older(q.low)),
            *rectangle(slice(q.middle, q.stop), older(q.high)),
        ]

    def _windowed(self, index: int, q_rank: int, kv_rank: int, window: int | None) -> list[Segment]:
        q, kv, shard = self.shares[q_rank][index], self.shares[kv_rank][index], self.shard(kv_rank, window)
        keys_C = torch.cat(
            [
                self.placement.local_positions(self.cached(index, window), kv_rank, self.device),
                torch.arange(kv.low.start, kv.low.stop, device=self.device),
                torch.arange(kv.high.start, kv.high.stop, device=self.device),
            ]
        )
        first = shard.starts[index]
        return [
            *by_position(q.low, q.start, keys_C, first, window),
            *by_position(q.high, q.middle, keys_C, first, window),
        ]
