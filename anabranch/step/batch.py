"""A ragged batch as tensors: what the model's layers read beside the hidden states.

Shape suffixes: T new tokens of all sequences, B sequences, N blocks of the longest table, S sampled rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anabranch.step.plan import StepPlan


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """One step's ragged batch, on the model's device.

    Attributes:
        token_ids_T: int64.
        positions_T: int64, position of each new token in its sequence.
        slots_T: int64, physical slot (block id x block size + offset) of each new token.
        query_starts: B + 1 offsets into T, as Python integers; sequence b's rows are
            `query_starts[b]:query_starts[b + 1]`.
        context_lens: per sequence, tokens in the cache once this step's KV is stored.
        query_starts_B1, context_lens_B: the same, int32.
        block_tables_BN: int32, padded with 0.
        sample_rows_S: int64, rows of T whose logits are needed.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    query_starts: tuple[int, ...]
    context_lens: tuple[int, ...]
    query_starts_B1: torch.Tensor
    context_lens_B: torch.Tensor
    block_tables_BN: torch.Tensor
    sample_rows_S: torch.Tensor

    @property
    def num_sequences(self) -> int:
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    @classmethod
    def from_plan(cls, plan: StepPlan, block_size: int, device: torch.device) -> ForwardBatch:
        """Lay a plan out as tensors."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        query_starts = [0]
        context_lens: list[int] = []
        sample_rows: list[int] = []
        for sequence in plan.sequences:
            table = sequence.block_ids
            token_ids.extend(sequence.token_ids)
            span = range(sequence.start, sequence.context_len)
            positions.extend(span)
            slots.extend(table[p // block_size] * block_size + p % block_size for p in span)
            query_starts.append(len(token_ids))
            context_lens.append(sequence.context_len)
            if sequence.sample is not None:
                sample_rows.append(len(token_ids) - 1)
        width = max(len(sequence.block_ids) for sequence in plan.sequences)
        tables = [list(s.block_ids) + [0] * (width - len(s.block_ids)) for s in plan.sequences]

        def tensor(values: list[int] | list[list[int]], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        return cls(
            token_ids_T=tensor(token_ids, torch.int64),
            positions_T=tensor(positions, torch.int64),
            slots_T=tensor(slots, torch.int64),
            query_starts=tuple(query_starts),
            context_lens=tuple(context_lens),
            query_starts_B1=tensor(query_starts, torch.int32),
            context_lens_B=tensor(context_lens, torch.int32),
            block_tables_BN=tensor(tables, torch.int32),
            sample_rows_S=tensor(sample_rows, torch.int64),
        )
