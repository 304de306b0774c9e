"""Tree attention: decode over a KV cache whose tokens are spread block-cyclic over CP ranks.

Every rank computes the same new tokens. In each layer the one rank that owns a token's block stores its KV,
every rank attends to its own shard, and one reduction merges the partial results, so all ranks go on with
the same hidden states, bit for bit.

A rank's shard is not contiguous in the sequence, so the kernels' causality, which counts local tokens, is
not the sequence's. For a sequence with one new token it does not matter: the token sees all that is stored,
and a window is the same window's worth of *local* tokens, counted per sequence. For several new tokens of a
sequence (a chunk of a prompt, or recomputing) masks by position are used: exact, and slower.

Source: Tree Attention (Shyam et al. 2024). Shape suffixes: T tokens, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from anabranch.attention.accumulate import Accumulator
from anabranch.attention.cp_batch import TreeBatch
from anabranch.attention.segments import Segment, attend_segments, by_position
from anabranch.attention.tree_reduce import Reduction
from anabranch.cache.paged_kv import LayerKv, PagedKv
from anabranch.kernels.base import Kernels
from anabranch.step.batch import ForwardBatch


@dataclass(frozen=True, kw_only=True)
class _PagedPart:
    """Sequences with one new token that one kernel call serves.

    Attributes:
        rows: int64 rows of q; None: all of them, in order.
        window: of local tokens; None: all.
    """

    rows: torch.Tensor | None
    batch: ForwardBatch
    window: int | None


@dataclass(frozen=True, kw_only=True)
class _ChunkPart:
    """A sequence with several new tokens: which local tokens they see, by position."""

    rows: slice
    slots: torch.Tensor
    segments: tuple[Segment, ...]


@dataclass(frozen=True, kw_only=True)
class _LocalPlan:
    paged: tuple[_PagedPart, ...]
    chunks: tuple[_ChunkPart, ...]


class TreeAttention:
    """Attention of one forward pass on one CP rank.

    Args:
        kv: this rank's pool.
        batch: the step, as this rank stores and attends to it.
        reduction: merges the ranks' partial results; kept between steps by its owner.
    """

    def __init__(self, kernels: Kernels, kv: PagedKv, batch: TreeBatch, reduction: Reduction) -> None:
        self.kernels = kernels
        self.kv = kv
        self.batch = batch
        self.reduction = reduction
        self._plans: dict[int | None, _LocalPlan] = {}

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every rank calls it for the same layers in the same order.

        Returns:
            `(out [T, H, D] in q's dtype, lse [T, H] float32)` over the whole context, the same on every rank.

        Raises:
            PeerLost, DeadlineExceeded: see `Handle.wait`.
        """
        kv, batch = self.kv.layer(layer), self.batch
        if batch.store_rows.numel():
            self.kernels.store_kv(k_TKD[batch.store_rows], v_TKD[batch.store_rows], kv, batch.store_slots)
        out_THD, lse_TH = self.reduction.reduce(*self.attend_shard(kv, q_THD, scale, window))
        return out_THD.to(q_THD.dtype), lse_TH

    def attend_shard(
        self, kv: LayerKv, q_THD: torch.Tensor, scale: float, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's partial result; zeros and -inf where its shard holds nothing that the query sees."""
        if window not in self._plans:
            self._plans[window] = self._make_plan(window, q_THD.device)
        plan = self._plans[window]
        if len(plan.paged) == 1 and plan.paged[0].rows is None:
            part = plan.paged[0]
            return self.kernels.paged_attention(q_THD, kv, part.batch, scale, part.window)
        total = Accumulator.like(q_THD)
        for part in plan.paged:
            assert part.rows is not None
            out, lse = self.kernels.paged_attention(q_THD[part.rows], kv, part.batch, scale, part.window)
            total.out_THD[part.rows] = out.float()
            total.lse_TH[part.rows] = lse
        k_slots, v_slots = kv.slots()
        for chunk in plan.chunks:
            k_CKD, v_CKD = k_slots[chunk.slots], v_slots[chunk.slots]
            attend_segments(
                self.kernels, chunk.segments, q_THD[chunk.rows], k_CKD, v_CKD, scale, total.view(chunk.rows)
            )
        return total.out_THD, total.lse_TH

    def _make_plan(self, window: int | None, device: torch.device) -> _LocalPlan:
        """Sort the sequences by how they are attended to; sequences that see nothing here are in neither."""
        batch, placement = self.batch, self.batch.placement
        groups: dict[int | None, list[tuple[int, int]]] = defaultdict(list)
        chunks = []
        for index, sequence in enumerate(batch.sequences):
            first = 0 if window is None else max(0, sequence.start - window + 1)
            seen = range(first, sequence.context_len)
            num_local = placement.num_local(sequence.context_len, batch.rank)
            num_seen = num_local - placement.num_local(first, batch.rank)
            if num_seen == 0:
                continue
            if sequence.num_new_tokens == 1:
                groups[None if num_seen == num_local else num_seen].append((index, num_local))
                continue
            rows = slice(batch.query_starts[index], batch.query_starts[index + 1])
            positions = placement.local_positions(seen, batch.rank, device)
            queries = range(sequence.start, sequence.context_len)
            chunks.append(
                _ChunkPart(
                    rows=rows,
                    slots=placement.local_slots(seen, batch.rank, sequence.block_ids, device),
                    segments=tuple(by_position(queries, 0, positions, 0, window)),
                )
            )
        paged = tuple(self._paged_part(members, local_window, device) for local_window, members in groups.items())
        return _LocalPlan(paged=paged, chunks=tuple(chunks))

    def _paged_part(self, members: list[tuple[int, int]], local_window: int | None, device: torch.device) -> _PagedPart:
        batch = self.batch
        rows = [batch.query_starts[index] for index, _ in members]
        tables = [batch.sequences[index].block_ids for index, _ in members]
        context_lens = tuple(num_local for _, num_local in members)
        width = max(len(table) for table in tables)
        rows_T = torch.tensor(rows, dtype=torch.int64).to(device)
        starts = tuple(range(len(rows) + 1))
        empty = torch.empty(0, dtype=torch.int64, device=device)
        local = ForwardBatch(
            token_ids_T=batch.token_ids_T[rows_T],
            positions_T=batch.positions_T[rows_T],
            slots_T=empty,
            query_starts=starts,
            context_lens=context_lens,
            query_starts_B1=torch.tensor(starts, dtype=torch.int32).to(device),
            context_lens_B=torch.tensor(context_lens, dtype=torch.int32).to(device),
            block_tables_BN=torch.tensor(
                [list(table) + [0] * (width - len(table)) for table in tables], dtype=torch.int32
            ).to(device),
            sample_rows_S=empty,
        )
        whole = rows == list(range(batch.num_tokens))
        return _PagedPart(rows=None if whole else rows_T, batch=local, window=local_window)
