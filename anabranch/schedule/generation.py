"""Continuous batching: every running sequence gains a token per step; sequences join and leave between steps.

imported (KV came from a prefill worker) --+
                                           +--> running --> finished
prompt (colocated) --> chunks -------------+     |  ^
        ^                                        |  +--- blocks are free again --- offloaded (KV in host memory)
        |                        blocks ran out  v                                    ^
        +--- computed again (colocated) --- preempted --------------------------------+
                                                 +---> back to the orchestrator (split)

First come, first served: the youngest is preempted, the oldest that was offloaded comes back first, and nobody new is
let in before it. At most `max_running` run, compute their prompts, are offloaded or hold a lease at a time, and no more
than a step has tokens: so every running sequence has its place in every step.

One step is scheduled ahead: while a step is in flight, the next one is planned, and goes on with tokens that are not
known here yet (`SequencePlan.follows`). It is not where that would be wrong or of no use:

    the token in flight will be the last by its number        the sequence is left out
    a prompt's chunk is in flight, which is long              nothing; who comes meanwhile joins the next step
    blocks have run out                                       nothing; then preemption sees every token

Sequences may be dealt to lanes, each with steps of its own that follow each other: while one lane's step waits for
something, another lane's goes on. What runs out of blocks waits until no lane has a step in flight.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from anabranch.cache.kv_manager import KvCacheManager
from anabranch.request.request import EndReason
from anabranch.sampling.stop import StopChecker
from anabranch.schedule.flights import Flight, Flights
from anabranch.schedule.host_offload import HostOffload
from anabranch.schedule.prompts import PromptQueue
from anabranch.schedule.sequence import Sequence
from anabranch.step.plan import SampledToken, SequencePlan, StepPlan, StepResult


def _age(sequence: Sequence) -> tuple[float, str]:
    """A sequence is never preempted for a younger one."""
    return sequence.age


@dataclass(kw_only=True)
class StepOutcome:
    """What a step changed.

    Attributes:
        tokens: every new token.
        ended: sequences that are over, and why; their blocks are free.
    """

    tokens: list[SampledToken] = field(default_factory=list)
    ended: list[tuple[Sequence, EndReason]] = field(default_factory=list)


class GenerationScheduler:
    """`schedule() -> StepPlan -> update(plan, result)` for each step, in this order; the next `schedule` may go before.

    What a step in flight uses may be freed at any time (a sequence ended, was cancelled or sent away): ranks obey
    in order, so a step, stream or copy that is sent later and uses these blocks again comes after it. Nor can it spoil
    what the prefix cache keeps of them: it writes behind the tokens that are known, and only full blocks of known
    and computed tokens are published.

    Args:
        stop: says when a sequence is over.
        computes_prompts: a colocated worker computes prompts, and preempted sequences again, itself;
            otherwise preempted sequences that are not offloaded end here as `preempted`.
        max_running: most sequences that hold blocks or are offloaded; never more than a step has tokens.
        max_step_tokens: most new tokens in one step.
        offload: where sequences that are preempted are kept with their KV; None: nowhere.
        ahead: plan a step while one is in flight.
        lanes: most steps that go their own ways; one where prompts are computed.
        clock: gives seconds; only differences matter.

    Attributes:
        num_preempted: sequences that were preempted since the start.
        num_offloaded: of these, the ones whose KV was kept.
    """

    def __init__(
        self,
        cache: KvCacheManager,
        stop: StopChecker,
        *,
        computes_prompts: bool,
        max_running: int,
        max_step_tokens: int,
        offload: HostOffload | None = None,
        ahead: bool = True,
        lanes: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cache = cache
        self.stop = stop
        self.computes_prompts = computes_prompts
        self.max_running = min(max_running, max_step_tokens)
        self.max_step_tokens = max_step_tokens
        assert lanes == 1 or not computes_prompts
        self.prompts = PromptQueue(cache)
        self.running: list[Sequence] = []
        self.offload = offload
        self.num_preempted = 0
        self.num_offloaded = 0
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._flights = Flights(lanes, max_ahead=2 if ahead else 1)
        self._lanes: dict[Sequence, int] = {}
        self._num_lanes = lanes
        # Blocks have run out, or lanes are to be dealt: nothing is planned before all that is in flight has landed.
        self._draining = False
        self._dealing = False
        self._step = 0
        self._clock = clock
        # When the steps that have not ended were planned, and when the last one ended.
        self._planned_s: dict[int, float] = {}
        self._ended_s = 0.0

    @property
    def num_places(self) -> int:
        """How many may be let in beside those that run or compute their prompts; 0 while any is offloaded.

        Blocks are the other limit: a block id means a block of every rank, so what is left of them on the fullest
        rank is what is left in the one pool that is counted.
        """
        if self.offload:
            return 0
        return max(0, self.max_running - len(self.running) - len(self.prompts.computing))

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
        self._run(sequence)
        if self.offload is not None:
            # What it costs to send a sequence back: it would queue, be computed and be streamed again.
            seconds = self._clock() - sequence.arrival_s
            self.offload.rule.cost.measured(sequence.num_tokens, max(0.0, seconds))
        outcome = StepOutcome()
        self._take(sequence, first, outcome)
        return outcome

    @property
    def num_lanes(self) -> int:
        """Lanes that sequences are dealt to."""
        return self._num_lanes

    def deal(self, num_lanes: int) -> None:
        """Deal sequences to so many lanes from now on; all of them anew once nothing is in flight."""
        if num_lanes == self._num_lanes:
            return
        self._num_lanes = num_lanes
        self._draining = self._dealing = True

    def attempts(self) -> tuple[tuple[str, int], ...]:
        """The attempts that are here."""
        return tuple(self._sequences)

    def preempted(self) -> list[Sequence]:
        """Those that were preempted in the middle of their answer and go on here by themselves."""
        offloaded = [] if self.offload is None else self.offload.sequences
        return [s for s in (*offloaded, *self.prompts.waiting, *self.prompts.computing) if s.num_output > 0]

    def remove(self, key: tuple[str, int]) -> Sequence | None:
        """Forget an attempt and free its blocks; None if it is not here."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            self._drop(sequence)
        return sequence

    def schedule(self) -> tuple[StepPlan | None, list[Sequence]]:
        """The next step (None: nothing can be computed), and the sequences that were sent away for lack of blocks.

        With a step in flight, None may also mean that its result has to come first.
        """
        if self._draining and self._flights:
            return None, []
        self._draining = False
        if self._dealing:
            self._dealing = False
            for index, sequence in enumerate(sorted(self.running, key=_age)):
                self._lanes[sequence] = index % self._num_lanes
        sent_away: list[Sequence] = []
        for lane in self._flights.order():
            plan = self._plan(lane, sent_away) if self._flights.may_plan(lane) else None
            if plan is not None or self._draining:
                return plan, sent_away
        return None, sent_away

    def _plan(self, lane: int, sent_away: list[Sequence]) -> StepPlan | None:
        """A lane's next step; adds those that lose their blocks for it to `sent_away`."""
        before = self._flights.last(lane)
        rows: list[SequencePlan] = []
        sequences: list[Sequence] = []
        budget = self.max_step_tokens
        num_preempted = self.num_preempted
        for sequence in sorted(self.running, key=_age):
            if len(rows) >= self.max_running or budget <= 0:
                break
            if self._lanes.get(sequence) != lane:
                continue  # of another lane, or preempted for an older one in this very loop
            place = None if before is None else before.places.get(sequence)
            if place is not None and self._ends_next(sequence):
                continue
            assert sequence.table is not None
            if not self._flights:
                if not self._make_room(sequence, sent_away):
                    continue
            elif not self.cache.grow(sequence.table, sequence.num_tokens + (place is not None)):
                self._draining = True
                return None
            rows.append(sequence.plan(1) if place is None else sequence.follow(place))
            sequences.append(sequence)
            budget -= 1
        # Not in the step that took blocks away: what was offloaded just now would come back at once, to no end.
        if self.num_preempted == num_preempted or not rows:
            for sequence in self._restore(lane):
                rows.append(sequence.plan(1))
                sequences.append(sequence)
                budget -= 1
        chunks: list[tuple[Sequence, int]] = []
        if self.computes_prompts:
            chunks = self.prompts.next_chunks(budget, self.max_running - len(rows), max_admitted=self.num_places)
            rows.extend(sequence.plan(num_new) for sequence, num_new in chunks)
            sequences.extend(sequence for sequence, _ in chunks)
        if not rows:
            return None
        self._step += 1
        plan = StepPlan(step=self._step, sequences=tuple(rows), lane=lane)
        sampling = (sequence for sequence, row in zip(sequences, rows, strict=True) if row.sample is not None)
        places = {sequence: place for place, sequence in enumerate(sampling)}
        self._flights.launch(Flight(plan=plan, sequences=tuple(sequences), places=places, chunks=bool(chunks)))
        self._planned_s[self._step] = self._clock()
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> StepOutcome:
        """Take the result of a lane's oldest step in flight in; tokens of sequences that have left are dropped."""
        outcome = StepOutcome()
        self._measure(plan)
        sampled = {(token.request_id, token.epoch): token for token in result.tokens}
        for sequence, planned in self._land(plan):
            if result.ffn is not None:
                sequence.ffn = result.ffn if sequence.ffn is None else sequence.ffn + result.ffn
            if sequence in self.prompts.computing:
                if self.prompts.computed(sequence, planned.num_new_tokens):
                    self._run(sequence)
            elif sequence.table is not None:
                sequence.num_computed += planned.num_new_tokens
                self.cache.publish(sequence.table, sequence.tokens, sequence.num_computed)
            elif self.offload is not None and sequence in self.offload:
                # It was offloaded after this step had been planned, with what the step computed.
                sequence.num_computed += planned.num_new_tokens
            if sequence.key in sampled:
                self._take(sequence, sampled[sequence.key], outcome)
        return outcome

    def withdraw(self, plan: StepPlan) -> list[Sequence]:
        """Forget a lane's oldest step in flight, for it failed; returns its sequences that are still here."""
        return [sequence for sequence, _ in self._land(plan)]

    def _land(self, plan: StepPlan) -> list[tuple[Sequence, SequencePlan]]:
        flight = self._flights.land(plan)
        for table in flight.held:
            self.cache.release(table)
        pairs = zip(flight.sequences, plan.sequences, strict=True)
        return [pair for pair in pairs if self._sequences.get(pair[0].key) is pair[0]]

    def _run(self, sequence: Sequence, lane: int | None = None) -> None:
        """Let a sequence have its place in a lane's steps: the lane with the fewest where none is named."""
        if lane is None:
            counts = Counter(self._lanes.values())
            lane = min(range(self._num_lanes), key=lambda lane: counts[lane])
        self._lanes[sequence] = lane
        self.running.append(sequence)

    def _ends_next(self, sequence: Sequence) -> bool:
        """Whether one more token is the last, whatever it is."""
        return self.stop.is_full(
            sequence.request.sampling, num_output=sequence.num_output + 1, num_tokens=sequence.num_tokens + 1
        )

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
        if self.offload is not None and self.offload.takes(sequence):
            self.num_offloaded += 1
            self._take_out(sequence)
            self.cache.release(self.offload.offload(sequence))
            return
        if not self.computes_prompts:
            self._drop(sequence)
            sent_away.append(sequence)
            return
        self._take_out(sequence)
        self._release(sequence)
        self.prompts.put_back(sequence)

    def _restore(self, lane: int) -> list[Sequence]:
        """Let offloaded sequences go on, oldest first, while their blocks and one to grow fit; those that decode.

        These are in `lane` from now on.
        """
        decoding: list[Sequence] = []
        pool = self.cache.pool
        while self.offload is not None and (sequence := self.offload.oldest) is not None:
            # Alone it needs none to grow: a request that fills the whole pool comes back too.
            spare = 1 if pool.num_free < pool.num_blocks else 0
            salt = sequence.request.cache_salt
            if not self.cache.can_admit(sequence.tokens, sequence.num_tokens, spare, cache_salt=salt):
                break
            table = self.cache.admit(sequence.key, sequence.tokens, sequence.num_tokens, cache_salt=salt)
            self.offload.restore(sequence, table)
            if sequence.num_remaining > 1:
                self.prompts.resume(sequence)
            else:
                self._run(sequence, lane)
                decoding.append(sequence)
        return decoding

    def _measure(self, plan: StepPlan) -> None:
        """Note what a prompt's step took: from the end of the step before, if it was planned earlier than that."""
        planned_s, self._ended_s = self._ended_s, self._clock()
        planned_s = max(planned_s, self._planned_s.get(plan.step, planned_s))
        self._planned_s = {step: at_s for step, at_s in self._planned_s.items() if step > plan.step}
        if self.offload is not None and any(planned.num_new_tokens > 1 for planned in plan.sequences):
            self.offload.rule.cost.measured(plan.num_tokens, max(0.0, self._ended_s - planned_s))

    def _drop(self, sequence: Sequence) -> None:
        del self._sequences[sequence.key]
        self._take_out(sequence)
        if self.offload is not None:
            self.offload.forget(sequence)
        self._release(sequence)

    def _take_out(self, sequence: Sequence) -> None:
        if self._lanes.pop(sequence, None) is not None:
            self.running.remove(sequence)
        self.prompts.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        table = sequence.let_go()
        if table is not None and not self._flights.hold(sequence, table):
            self.cache.release(table)
