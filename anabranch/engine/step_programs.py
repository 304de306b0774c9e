"""Decode steps as programs: each batch size is recorded the first time that it comes, and repeated after that.

The plain path, a forward pass call by call, stays what everything is computed by that has no program: chunks of
prompts, context-parallel ranks, steps whose KV somebody waits for, and models whose layers do more than native
calls. Both give the same logits, bit for bit.

    plan --fill--> inputs (token ids, positions, slots, tables, ..; at fixed addresses)
                   embedding, rotary angles    computed before, written to inputs as well
                   layers, norm, LM head       the program
"""

from __future__ import annotations

import torch

from anabranch.attention.paged import PagedAttention
from anabranch.cache.paged_kv import PagedKv
from anabranch.engine.kept_programs import KeptPrograms
from anabranch.engine.last_tokens import LastTokens
from anabranch.engine.step_inputs import StepInputs
from anabranch.kernels.base import Kernels
from anabranch.kernels.record import Program, StepRecorder
from anabranch.model.ffn_half import FfnCalls
from anabranch.model.transformer import Transformer
from anabranch.step.plan import StepPlan


class StepPrograms:
    """A rank's recorded decode steps of whole layers.

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
        self._memory = self._recorder.program_memory()
        self._inputs = StepInputs(model.attention, kv, max_rows, max_blocks)
        # By (sequences, threads).
        self._programs = KeptPrograms[Program]()

    def covers(self, plan: StepPlan) -> bool:
        """Whether a plan is a step that programs are for."""
        return self._programs.can_be(_kind(plan)) and self._inputs.covers(plan)

    def forward(self, plan: StepPlan, last_tokens: LastTokens) -> FfnCalls[torch.Tensor]:
        """Run a step that is covered; it stops at no FFN half.

        Args:
            last_tokens: what the step before sampled, for sequences that follow it.

        Returns:
            This rank's share of the logits (`AttentionStack.forward`), to be read before the next step.

        Raises:
            PeerLost, DeadlineExceeded: another rank is gone or late.
        """
        yield from ()
        count, inputs, model = len(plan.sequences), self._inputs, self._model
        batch = inputs.write(plan, last_tokens)
        program = self._programs.get(_kind(plan))
        if program is not None:
            program.run()
            return program.output
        hidden_TC, cos_TR, sin_TR = inputs.hidden_TC[:count], inputs.cos_TR[:count], inputs.sin_TR[:count]
        attention = PagedAttention(self._kernels, self._kv, batch)
        recording = self._recorder.record(lambda: model.decode(hidden_TC, cos_TR, sin_TR, attention), self._memory)
        what = f"decode steps of {count} sequences"
        self._programs.keep(_kind(plan), recording.program, what, recording.obstacle)
        return recording.output


def _kind(plan: StepPlan) -> tuple[int, int]:
    return len(plan.sequences), torch.get_num_threads()
