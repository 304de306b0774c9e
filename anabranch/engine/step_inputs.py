"""What a recorded step is computed from: tensors whose addresses stay, and whose contents change from step to step.

Shape suffixes: T rows of a step (its sequences), B the same, N blocks, C hidden, R rotary dim.
"""

from __future__ import annotations

import torch

from anabranch.cache.paged_kv import PagedKv
from anabranch.engine.last_tokens import LastTokens
from anabranch.model.attention_stack import AttentionStack
from anabranch.step.batch import ForwardBatch
from anabranch.step.plan import StepPlan


class StepInputs:
    """What differs from step to step, at addresses that do not.

    Args:
        max_rows: most sequences of a step.
        max_blocks: most blocks of a sequence.
    """

    def __init__(self, stack: AttentionStack, kv: PagedKv, max_rows: int, max_blocks: int) -> None:
        device, config = stack.device, stack.config
        self._stack = stack
        self.max_rows = max_rows
        self.max_blocks = max_blocks
        self._block_size = kv.block_size
        # Token ids, positions and slots, written together.
        self._ids_3T = torch.zeros((3, max_rows), dtype=torch.int64, device=device)
        self._lens_T = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._starts_T1 = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._tables_BN = torch.zeros((max_rows, max_blocks), dtype=torch.int32, device=device)
        self._rows_T = torch.arange(max_rows, device=device)
        self.hidden_TC = torch.zeros((max_rows, config.hidden_size), dtype=stack.dtype, device=device)
        self.cos_TR, self.sin_TR = (torch.zeros((max_rows, config.rope.rotary_dim), device=device) for _ in range(2))
        # What each row of the tables was last written from.
        self._written: list[tuple[int, ...]] = [()] * max_rows

    def covers(self, plan: StepPlan) -> bool:
        """Whether a plan is a step that programs are for: one new token of each sequence, and all sampled."""
        return len(plan.sequences) <= self.max_rows and all(
            len(s.token_ids) == 1 and s.sample is not None and len(s.block_ids) <= self.max_blocks
            for s in plan.sequences
        )

    def write(self, plan: StepPlan, last_tokens: LastTokens) -> ForwardBatch:
        """Write all that a step which is covered begins with, embedded; the batch's tensors are views of the inputs.

        Args:
            last_tokens: what the step before sampled, for sequences that follow it.
        """
        batch, stack, count = self._fill(plan), self._stack, len(plan.sequences)
        last_tokens.fill_in(plan, batch.token_ids_T)
        self.hidden_TC[:count].copy_(stack.embed(batch.token_ids_T))
        cos_TR, sin_TR = stack.rotary.forward(batch.positions_T)
        self.cos_TR[:count].copy_(cos_TR)
        self.sin_TR[:count].copy_(sin_TR)
        return batch

    def _fill(self, plan: StepPlan) -> ForwardBatch:
        size, sequences = self._block_size, plan.sequences
        count = len(sequences)
        positions = [sequence.start for sequence in sequences]
        slots = [s.block_ids[s.start // size] * size + s.start % size for s in sequences]
        self._ids_3T[:, :count] = torch.tensor([[s.token_ids[0] for s in sequences], positions, slots])
        context_lens = tuple(position + 1 for position in positions)
        self._lens_T[:count] = torch.tensor(context_lens, dtype=torch.int32)
        for row, sequence in enumerate(sequences):
            table = sequence.block_ids
            if table is not self._written[row] and table != self._written[row]:
                self._tables_BN[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
            self._written[row] = table
        token_ids_T, positions_T, slots_T = self._ids_3T[:, :count]
        return ForwardBatch(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            slots_T=slots_T,
            query_starts=tuple(range(count + 1)),
            context_lens=context_lens,
            query_starts_B1=self._starts_T1[: count + 1],
            context_lens_B=self._lens_T[:count],
            block_tables_BN=self._tables_BN[:count],
            sample_rows_S=self._rows_T[:count],
        )
