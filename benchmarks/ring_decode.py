"""Ring decoding: the baseline that tree attention is measured against. KV shards travel; queries stay.

Every rank computes the same new tokens and, as each rank's shard of the KV passes, attends to it. What a
rank sends grows with the context, `(P - 1) * 2 * tokens / P * K * D` elements per layer, where a tree's
message does not depend on it.

Source: Tree Attention (Shyam et al. 2024), section 6.3, of Ring Attention (Liu et al. 2023) in decode.
"""

from __future__ import annotations

import torch

from anabranch.attention.accumulate import Accumulator
from anabranch.attention.cp_batch import TreeBatch
from anabranch.attention.segments import attend_segments, by_position
from anabranch.cache.paged_kv import PagedKv
from anabranch.kernels.base import Kernels
from anabranch.parallel.exchange import Exchange, Handle
from benchmarks.reductions import make_parts


class RingDecode:
    """Attention of one forward pass on one CP rank; same arguments and results as `TreeAttention`.

    Args:
        exchange: the CP group's.
    """

    def __init__(self, kernels: Kernels, kv: PagedKv, batch: TreeBatch, exchange: Exchange) -> None:
        self.kernels = kernels
        self.kv = kv
        self.batch = batch
        self.exchange = exchange

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TreeAttention.attend`."""
        kv, batch = self.kv.layer(layer), self.batch
        if batch.store_rows.numel():
            self.kernels.store_kv(k_TKD[batch.store_rows], v_TKD[batch.store_rows], kv, batch.store_slots)
        rank, size = self.exchange.rank, self.exchange.size
        slots = torch.cat(
            [
                batch.placement.local_slots(range(s.context_len), rank, s.block_ids, q_THD.device)
                for s in batch.sequences
            ]
        )
        shard = [pool[slots] for pool in kv.slots()]
        all_ranks = make_parts(size, q_THD)
        for step in range(size):
            source = (rank - step) % size
            travel: Handle | None = None
            incoming = shard
            if step < size - 1:
                shape = (self._num_rows((source - 1) % size), *k_TKD.shape[1:])
                incoming = [self.exchange.buffer_like(part.new_empty(shape)) for part in shard]
                send, receive = ([part for part in parts if part.numel()] for parts in (shard, incoming))
                travel = self.exchange.post(send, (rank + 1) % size, receive, (rank - 1) % size)
            part = self._attend_shard(source, q_THD, shard, scale, window)
            all_ranks.parts[source].pack(part.out_THD, part.lse_TH)
            if travel is not None:
                travel.wait()
            shard = incoming
        # In rank order on every rank, so that all get the same bits.
        [total] = make_parts(1, q_THD).parts
        all_ranks.combine(total)
        out_THD, lse_TH = total.unpack()
        return out_THD.to(q_THD.dtype), lse_TH

    def _num_rows(self, rank: int) -> int:
        return sum(self.batch.placement.num_local(s.context_len, rank) for s in self.batch.sequences)

    def _attend_shard(
        self, source: int, q_THD: torch.Tensor, shard: list[torch.Tensor], scale: float, window: int | None
    ) -> Accumulator:
        part = Accumulator.like(q_THD)
        first = 0
        for index, sequence in enumerate(self.batch.sequences):
            positions = self.batch.placement.local_positions(range(sequence.context_len), source, q_THD.device)
            queries = range(sequence.start, sequence.context_len)
            segments = by_position(queries, self.batch.query_starts[index], positions, first, window)
            attend_segments(self.kernels, tuple(segments), q_THD, shard[0], shard[1], scale, part)
            first += positions.numel()
        return part
