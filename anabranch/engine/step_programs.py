"""Decode steps as programs: each batch size is recorded the first time that it comes, and repeated after that.

The plain path, a forward pass call by call, stays what everything is computed by that has no program: chunks of
prompts, context-parallel ranks, steps whose KV somebody waits for, and models whose layers do more than native
calls. Both give the same logits, bit for bit.

    plan --fill--> inputs (token ids, positions, slots, tables, ..; at fixed addresses)
                   embedding, rotary angles    computed before, written to inputs as well
                   layers, norm, LM head       the program
"""

from __future__ import annotations

import logging
from collections import OrderedDict

import torch

from anabranch.attention.paged import PagedAttention
from anabranch.cache.paged_kv import PagedKv
from anabranch.engine.last_tokens import LastTokens
from anabranch.kernels.base import Kernels
from anabranch.kernels.record import Program, StepRecorder
from anabranch.model.transformer import Transformer
from anabranch.step.batch import ForwardBatch
from anabranch.step.plan import StepPlan

logger = logging.getLogger(__name__)

# Some 50 KB each; steps of more sizes than this take turns.
MAX_PROGRAMS = 128


class StepInputs:
    """What differs from step to step, at addresses that do not.

    Args:
        max_rows: most sequences of a step.
        max_blocks: most blocks of a sequence.

    Shape suffixes: T rows of a step (its sequences), B the same, N blocks, C hidden, R rotary dim.
    """

    def __init__(self, model: Transformer, kv: PagedKv, max_rows: int, max_blocks: int) -> None:
        stack = model.attention
        device, config = stack.device, stack.config
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

    def fill(self, plan: StepPlan) -> ForwardBatch:
        """Write a plan of one new token for each sequence; the batch's tensors are views of the inputs."""
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
        return self.batch(context_lens)

    def batch(self, context_lens: tuple[int, ...]) -> ForwardBatch:
        """Views of the inputs of as many sequences."""
        count = len(context_lens)
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


class StepPrograms:
    """A rank's recorded decode steps.

    Args:
        kernels: record.
        max_rows: most sequences of a step that is recorded.
        max_blocks: most blocks of a sequence in such a step.
    """

    def __init__(self, model: Transformer, kv: PagedKv, kernels: Kernels, *, max_rows: int, max_blocks: int) -> None:
        assert isinstance(kernels, StepRecorder)
        self._model = model
        self._kv = kv
        self._kernels = kernels
        self._recorder: StepRecorder = kernels
        self._inputs = StepInputs(model, kv, max_rows, max_blocks)
        # By (sequences, threads), the least recently used first; None: known to be no program.
        self._programs: OrderedDict[tuple[int, int], Program | None] = OrderedDict()
        self._told: set[str] = set()

    def covers(self, plan: StepPlan) -> bool:
        """Whether a plan is a step that programs are for: one new token of each sequence, and all sampled."""
        sequences, inputs = plan.sequences, self._inputs
        if len(sequences) > inputs.max_rows or self._programs.get(self._key(plan), self) is None:
            return False
        return all(
            len(s.token_ids) == 1 and s.sample is not None and len(s.block_ids) <= inputs.max_blocks for s in sequences
        )

    def forward(self, plan: StepPlan, last_tokens: LastTokens) -> torch.Tensor:
        """Run a step that is covered.

        Args:
            last_tokens: what the step before sampled, for sequences that follow it.

        Returns:
            This rank's share of the logits (`AttentionStack.forward`), to be read before the next step.

        Raises:
            PeerLost, DeadlineExceeded: another rank is gone or late.
        """
        count, inputs, model = len(plan.sequences), self._inputs, self._model
        stack = model.attention
        batch = inputs.fill(plan)
        last_tokens.fill_in(plan, batch.token_ids_T)
        hidden_TC, cos_TR, sin_TR = inputs.hidden_TC[:count], inputs.cos_TR[:count], inputs.sin_TR[:count]
        hidden_TC.copy_(stack.embed(batch.token_ids_T))
        for to_TR, from_TR in zip((cos_TR, sin_TR), stack.rotary.forward(batch.positions_T), strict=True):
            to_TR.copy_(from_TR)
        key = self._key(plan)
        program = self._programs.get(key)
        if program is not None:
            self._programs.move_to_end(key)
            program.run()
            return program.output
        attention = PagedAttention(self._kernels, self._kv, batch)
        recording = self._recorder.record(lambda: model.decode(hidden_TC, cos_TR, sin_TR, attention))
        self._keep(key, recording.program)
        if recording.obstacle is not None and recording.obstacle not in self._told:
            self._told.add(recording.obstacle)
            logger.info("decode steps of %d sequences are not recorded: %s", count, recording.obstacle)
        return recording.output

    def _keep(self, key: tuple[int, int], program: Program | None) -> None:
        self._programs[key] = program
        if len(self._programs) > MAX_PROGRAMS:
            self._programs.popitem(last=False)

    @staticmethod
    def _key(plan: StepPlan) -> tuple[int, int]:
        return len(plan.sequences), torch.get_num_threads()
