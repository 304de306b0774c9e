"""A step plan as one context-parallel rank sees it: which rows it computes, and what it stores where.

Two ways to run the same plan, over the same placement of KV (`BlockCyclic`):

- `RingBatch`: each rank computes its zigzag share of every sequence's new tokens and ring attention joins
  the ranks. For prompts.
- `TreeBatch`: every rank computes every new token, attends to its own shard of the KV, and tree attention
  joins the ranks. For decode steps; chunks of prompts on the way are correct, though not sped up.

A chunk computed in one way may be followed by one computed in the other. `plan.sequences[i].block_ids` name
spans of `cp * block_size` tokens, see `BlockCyclic`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anabranch.attention.ring_geometry import RingGeometry
from anabranch.parallel.placement import BlockCyclic
from anabranch.step.plan import SequencePlan, StepPlan


@dataclass(frozen=True, kw_only=True)
class RingBatch:
    """The rows of one rank in ring attention; a rank may have none.

    Attributes:
        rank: CP rank.
        geometry: what every rank computes and holds.
        token_ids_T, positions_T: int64, of this rank's rows.
        sample_rows_S: int64; every sampled row is rank 0's, so it is empty elsewhere.
    """

    rank: int
    geometry: RingGeometry
    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    sample_rows_S: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.shape[0]

    @classmethod
    def from_plan(cls, plan: StepPlan, block_size: int, rank: int, cp: int, device: torch.device) -> RingBatch:
        """Lay out `rank`'s share of a plan."""
        return cls.from_geometry(RingGeometry(plan, BlockCyclic(block_size=block_size, cp=cp), device), rank)

    @classmethod
    def from_geometry(cls, geometry: RingGeometry, rank: int) -> RingBatch:
        """Lay out `rank`'s rows of a ring."""
        token_ids: list[int] = []
        sample_rows: list[int] = []
        for sequence, share in zip(geometry.sequences, geometry.shares[rank], strict=True):
            for tokens in (share.low, share.high):
                token_ids.extend(_new_token_ids(sequence, tokens))
            last = sequence.context_len - 1
            if sequence.sample is not None and (last in share.low or last in share.high):
                sample_rows.append(share.stop - 1)
        return cls(
            rank=rank,
            geometry=geometry,
            token_ids_T=torch.tensor(token_ids, dtype=torch.int64).to(geometry.device),
            positions_T=geometry.positions(rank),
            sample_rows_S=torch.tensor(sample_rows, dtype=torch.int64).to(geometry.device),
        )


@dataclass(frozen=True, kw_only=True)
class TreeBatch:
    """All rows of a plan, and what one rank stores and attends to of them.

    Attributes:
        rank: CP rank.
        placement: where KV lies.
        sequences: the plan's.
        token_ids_T, positions_T, sample_rows_S: int64, the same on every rank.
        query_starts: sequence b's rows are `query_starts[b]:query_starts[b + 1]`.
        store_rows, store_slots: int64; the rows whose KV this rank stores, and where.
    """

    rank: int
    placement: BlockCyclic
    sequences: tuple[SequencePlan, ...]
    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    sample_rows_S: torch.Tensor
    query_starts: tuple[int, ...]
    store_rows: torch.Tensor
    store_slots: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    @classmethod
    def from_plan(cls, plan: StepPlan, block_size: int, rank: int, cp: int, device: torch.device) -> TreeBatch:
        """Lay a plan out for `rank`."""
        placement = BlockCyclic(block_size=block_size, cp=cp)
        token_ids: list[int] = []
        positions: list[int] = []
        sample_rows: list[int] = []
        store_rows: list[int] = []
        store_slots: list[int] = []
        query_starts = [0]
        for sequence in plan.sequences:
            token_ids.extend(sequence.token_ids)
            for row, position in enumerate(range(sequence.start, sequence.context_len), start=len(positions)):
                positions.append(position)
                if placement.owner(position) == rank:
                    store_rows.append(row)
                    block = sequence.block_ids[position // placement.span]
                    store_slots.append(block * block_size + position % block_size)
            query_starts.append(len(token_ids))
            if sequence.sample is not None:
                sample_rows.append(len(token_ids) - 1)

        def tensor(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64).to(device)

        return cls(
            rank=rank,
            placement=placement,
            sequences=plan.sequences,
            token_ids_T=tensor(token_ids),
            positions_T=tensor(positions),
            sample_rows_S=tensor(sample_rows),
            query_starts=tuple(query_starts),
            store_rows=tensor(store_rows),
            store_slots=tensor(store_slots),
        )


def _new_token_ids(sequence: SequencePlan, tokens: range) -> tuple[int, ...]:
    return sequence.token_ids[tokens.start - sequence.start : tokens.stop - sequence.start]
