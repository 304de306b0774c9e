"""Chunked prefill: prompts in order of arrival, several in one step, up to the first token of each."""

from __future__ import annotations

from anabranch.cache.kv_manager import KvCacheManager
from anabranch.schedule.prompts import PromptQueue
from anabranch.schedule.sequence import Sequence
from anabranch.step.plan import SampledToken, StepPlan, StepResult


class PrefillScheduler:
    """`schedule() -> StepPlan -> update(plan, result)`, one cycle per step.

    Args:
        max_step_tokens: most new tokens in one step.
        max_running: most sequences in one step.
    """

    def __init__(self, cache: KvCacheManager, *, max_step_tokens: int, max_running: int) -> None:
        self.cache = cache
        self.prompts = PromptQueue(cache)
        self.max_step_tokens = max_step_tokens
        self.max_running = max_running
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._step = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence.key] = sequence
        self.prompts.add(sequence)

    def attempts(self) -> tuple[tuple[str, int], ...]:
        """The attempts that are here."""
        return tuple(self._sequences)

    def remove(self, key: tuple[str, int]) -> Sequence | None:
        """Forget an attempt and free its blocks; None if it is not here."""
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            self.prompts.remove(sequence)
            self._release(sequence)
        return sequence

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can be computed."""
        chunks = self.prompts.next_chunks(self.max_step_tokens, self.max_running)
        if not chunks:
            return None
        self._step += 1
        return StepPlan(step=self._step, sequences=tuple(sequence.plan(num_new) for sequence, num_new in chunks))

    def update(self, plan: StepPlan, result: StepResult) -> list[tuple[Sequence, SampledToken]]:
        """Take a step's result in; returns the sequences whose first token it brought. They are done here."""
        first_tokens = {(token.request_id, token.epoch): token for token in result.tokens}
        finished = []
        for planned in plan.sequences:
            sequence = self._sequences.get((planned.request_id, planned.epoch))
            if sequence is not None and self.prompts.computed(sequence, planned.num_new_tokens):
                token = first_tokens[sequence.key]
                sequence.append(token.token_id)
                del self._sequences[sequence.key]
                self._release(sequence)
                finished.append((sequence, token))
        return finished

    def _release(self, sequence: Sequence) -> None:
        table = sequence.let_go()
        if table is not None:
            self.cache.release(table)
