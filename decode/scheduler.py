"""Continuous batching: every running sequence gains a token per step; sequences join and leave between steps.

imported (KV came from a prefill worker) --+
                                           +--> running --> finished
prompt (colocated) --> chunks -------------+       |
        ^                                          v blocks ran out
        +--- computed again (colocated) --- preempted ---> back to the orchestrator (split)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from anabranch.cache.kv_manager import KvCacheManager
from anabranch.engine.plan import SampledToken, SequencePlan, StepPlan, StepResult
from anabranch.engine.prompts import PromptQueue
from anabranch.engine.sequence import Sequence
from anabranch.protocol.requests import EndReason
from anabranch.sampling.stop import StopChecker


def _age(sequence: Sequence) -> tuple[float, str]:
    """Sorts oldest first, without ties: a sequence is never preempted for a younger one."""
    return (sequence.arrival_s, sequence.request.request_id)


@dataclass(kw_only=True)
class StepOutcome:
    """What a step changed.

    Attributes:
        tokens: every new token.
        ended: sequences that are over, and why; their blocks are free.
    """

    tokens: list[SampledToken] = field(default_factory=list)
    ended: list[tuple[Sequence, EndReason]] = field(default_factory=list)


class DecodeScheduler:
    """`schedule() -> StepPlan -> update(plan, result)`, one cycle per step.

    Args:
        stop: says when a sequence is over.
        computes_prompts: a colocated worker computes prompts, and preempted sequences again, itself;
            otherwise preempted sequences end here as `preempted`.
        max_running: most sequences in one step.
        max_step_tokens: most new tokens in one step.
    """

    def __init__(
        self,
        cache: KvCacheManager,
        stop: StopChecker,
        *,
        computes_prompts: bool,
        max_running: int,
        max_step_tokens: int,
    ) -> None:
        self.cache = cache
        self.stop = stop
        self.computes_prompts = computes_prompts
        self.max_running = max_running
        self.max_step_tokens = max_step_tokens
        self.prompts = PromptQueue(cache)
        self.running: list[Sequence] = []
        self.num_preempted = 0
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._step = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._sequences

    def add_prompt(self, sequence: Sequence) -> None:
        assert self.computes_prompts
        self._sequences[sequence.key] = sequence
        self.prompts.add(sequence)

    def join(self, sequence: Sequence, first: SampledToken) -> StepOutcome:
        """Let an imported sequence join the batch: its KV is in its blocks and `first` was sampled elsewhere."""
        self._sequences[sequence.key] = sequence
        sequence.num_computed = sequence.num_tokens
        assert sequence.table is not None
        self.cache.publish(sequence.table, sequence.tokens, sequence.num_computed)
        self.running.append(sequence)
        outcome = StepOutcome()
        self._take(sequence, first, outcome)
        return outcome

    def attempts(self) -> tuple[tuple[str, int], ...]:
        """The attempts that are here."""
        return tuple(self._sequences)

    def remove(self, key: tuple[str, int]) -> Sequence | None:
        """Forget an attempt and free its blocks; None if it is not here."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._drop(sequence)
        return sequence

    def schedule(self) -> tuple[StepPlan | None, list[Sequence]]:
        """The next step (None: nothing can be computed), and the sequences that were sent away for lack of blocks."""
        sent_away: list[Sequence] = []
        rows: list[SequencePlan] = []
        budget = self.max_step_tokens
        for sequence in sorted(self.running, key=_age):
            if len(rows) >= self.max_running or budget <= 0:
                break
            if sequence not in self.running:
                continue  # preempted for an older one in this very loop
            if self._make_room(sequence, sent_away):
                rows.append(sequence.plan(1))
                budget -= 1
        if self.computes_prompts:
            chunks = self.prompts.next_chunks(budget, self.max_running - len(rows))
            rows.extend(sequence.plan(num_new) for sequence, num_new in chunks)
        if not rows:
            return None, sent_away
        self._step += 1
        return StepPlan(step=self._step, sequences=tuple(rows)), sent_away

    def update(self, plan: StepPlan, result: StepResult) -> StepOutcome:
        """Take a step's result in."""
        outcome = StepOutcome()
        sampled = {(token.request_id, token.epoch): token for token in result.tokens}
        for planned in plan.sequences:
            sequence = self._sequences.get((planned.request_id, planned.epoch))
            if sequence is None:
                continue
            if sequence in self.prompts.computing:
                if self.prompts.computed(sequence, planned.num_new_tokens):
                    self.running.append(sequence)
            else:
                sequence.num_computed += planned.num_new_tokens
                assert sequence.table is not None
                self.cache.publish(sequence.table, sequence.tokens, sequence.num_computed)
            if sequence.key in sampled:
                self._take(sequence, sampled[sequence.key], outcome)
        return outcome

    def _take(self, sequence: Sequence, token: SampledToken, outcome: StepOutcome) -> None:
        sequence.append(token.token_id)
        outcome.tokens.append(token)
        reason = self.stop.check(
            sequence.request.sampling, token.token_id, num_output=sequence.num_output, num_tokens=sequence.num_tokens
        )
        if reason is not None:
            self._drop(sequence)
            outcome.ended.append((sequence, reason))

    def _make_room(self, sequence: Sequence, sent_away: list[Sequence]) -> bool:
        """Grow the table by the token to compute, at the cost of the youngest; False if that is the sequence itself."""
        assert sequence.table is not None
        while not self.cache.grow(sequence.table, sequence.num_tokens):
            victim = max(self.running + self.prompts.computing, key=_age)
            self._preempt(victim, sent_away)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, sent_away: list[Sequence]) -> None:
        self.num_preempted += 1
        if not self.computes_prompts:
            self._drop(sequence)
            sent_away.append(sequence)
            return
        if sequence in self.running:
            self.running.remove(sequence)
        self.prompts.remove(sequence)
        self._release(sequence)
        self.prompts.put_back(sequence)

    def _drop(self, sequence: Sequence) -> None:
        del self._sequences[sequence.key]
        if sequence in self.running:
            self.running.remove(sequence)
        self.prompts.remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        table = sequence.let_go()
        if table is not None:
            self.cache.release(table)
