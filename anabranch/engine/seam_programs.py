"""Decode steps of attention halves as programs, cut where rows leave for FFN halves: one native call for each layer.

    plan --> inputs --> program 0 --rows--> . . . --answer--> program 1 --rows--> . . . --answer--> norm, LM head

Recorded as steps of whole layers are (`step_programs.py`), layer by layer. A gate is computed between the programs, for
it does more than native calls. Steps of several lanes are under way at the same time, so each lane has inputs and
memory of its own; what one layer hands to the next stays in place meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anabranch.attention.paged import PagedAttention
from anabranch.cache.paged_kv import PagedKv
from anabranch.engine.kept_programs import KeptPrograms
from anabranch.engine.last_tokens import LastTokens
from anabranch.engine.step_inputs import StepInputs
from anabranch.kernels.base import Kernels
from anabranch.kernels.record import Program, StepRecorder
from anabranch.model.attention_stack import AttentionStack
from anabranch.model.ffn_half import FfnCall, FfnCalls
from anabranch.step.batch import ForwardBatch
from anabranch.step.plan import StepPlan


class _Lane:
    """What a lane's steps are computed in.

    Attributes:
        answer_TC: a layer's answer, for the program that goes on with it.
        memory: of its programs, of which one runs at a time.
    """

    def __init__(self, stack: AttentionStack, kv: PagedKv, recorder: StepRecorder, rows: int, blocks: int) -> None:
        self.inputs = StepInputs(stack, kv, rows, blocks)
        self.answer_TC = torch.zeros_like(self.inputs.hidden_TC)
        self.memory = recorder.program_memory()


class SeamPrograms:
    """A rank's recorded decode steps of attention halves.

    Args:
        kernels: record.
        max_rows: most sequences of a step that is recorded.
        max_blocks: most blocks of a sequence in such a step.

    Shape suffixes: T rows of a step, C hidden.
    """

    def __init__(self, stack: AttentionStack, kv: PagedKv, kernels: Kernels, *, max_rows: int, max_blocks: int) -> None:
        assert isinstance(kernels, StepRecorder)
        self._stack = stack
        self._kv = kv
        self._kernels = kernels
        self._recorder: StepRecorder = kernels
        self._max_rows = max_rows
        self._max_blocks = max_blocks
        self._lanes: dict[int, _Lane] = {}
        # By (lane, sequences, threads): a program for each layer, and one for what comes after the last.
        self._programs = KeptPrograms[list[Program]]()

    def covers(self, plan: StepPlan) -> bool:
        """Whether a plan is a step that programs are for."""
        return self._programs.can_be(_kind(plan)) and self._lane(plan.lane).inputs.covers(plan)

    def forward(self, plan: StepPlan, last_tokens: LastTokens) -> FfnCalls[torch.Tensor]:
        """Run a step that is covered; it stops at each FFN half. See `StepPrograms.forward`."""
        lane = self._lane(plan.lane)
        batch = lane.inputs.write(plan, last_tokens)
        programs = self._programs.get(_kind(plan))
        if programs is not None:
            return (yield from self._repeat(lane, programs, len(plan.sequences)))
        return (yield from self._record(lane, plan, batch))

    def _lane(self, number: int) -> _Lane:
        lane = self._lanes.get(number)
        if lane is None:
            lane = _Lane(self._stack, self._kv, self._recorder, self._max_rows, self._max_blocks)
            self._lanes[number] = lane
        return lane

    def _repeat(self, lane: _Lane, programs: Sequence[Program], count: int) -> FfnCalls[torch.Tensor]:
        answer_TC = lane.answer_TC[:count]
        for layer, half in enumerate(self._stack.layers):
            programs[layer].run()
            answer_TC.copy_((yield FfnCall(layer, half.choose(programs[layer].output))))
        programs[-1].run()
        return programs[-1].output

    def _record(self, lane: _Lane, plan: StepPlan, batch: ForwardBatch) -> FfnCalls[torch.Tensor]:
        stack, inputs, count = self._stack, lane.inputs, len(plan.sequences)
        hidden_TC, answer_TC = inputs.hidden_TC[:count], lane.answer_TC[:count]
        cos_TR, sin_TR = inputs.cos_TR[:count], inputs.sin_TR[:count]
        attention = PagedAttention(self._kernels, self._kv, batch)
        programs: list[Program] = []
        obstacle: str | None = None
        # What a layer leaves for the next one is held from here, and so keeps its place.
        left_TC = hidden_TC

        def half_step() -> torch.Tensor:
            nonlocal left_TC
            left_TC, normed_TC = half.step(left_TC, answer_TC if layer else None, cos_TR, sin_TR, attention)
            held.append(normed_TC)
            return normed_TC

        for layer, half in enumerate(stack.layers):
            held: list[torch.Tensor] = []
            recording = self._recorder.record(half_step, lane.memory)
            obstacle = obstacle or recording.obstacle
            programs += [recording.program] if recording.program else []
            answer_TC.copy_((yield FfnCall(layer, half.choose(recording.output))))
        recording = self._recorder.record(lambda: stack.logits(left_TC, answer_TC), lane.memory)
        obstacle = obstacle or recording.obstacle
        programs += [recording.program] if recording.program else []
        what = f"decode steps of {count} sequences in lane {plan.lane}"
        self._programs.keep(_kind(plan), None if obstacle else programs, what, obstacle)
        return recording.output


def _kind(plan: StepPlan) -> tuple[int, int, int]:
    return plan.lane, len(plan.sequences), torch.get_num_threads()
