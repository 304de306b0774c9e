"""One step ahead: what is planned behind a step in flight, and what becomes of it when the result is not as hoped."""

from __future__ import annotations

import random
from functools import partial

import pytest

from anabranch.schedule.generation import GenerationScheduler, StepOutcome
from anabranch.step.plan import SampledToken, StepPlan, StepResult
from tests.support.schedules import EOS, answer, join, scheduler, sequence

pytestmark = pytest.mark.unit

NUM_BLOCKS = 16

make = partial(scheduler, computes_prompts=False)


def launch(scheduler: GenerationScheduler) -> StepPlan:
    plan, sent_away = scheduler.schedule()
    assert plan is not None
    assert sent_away == []
    return plan


def parts(plan: StepPlan) -> list[tuple[str, tuple[int, ...], int, int | None, int]]:
    return [(s.request_id, s.token_ids, s.start, s.follows, s.sample.index) for s in plan.sequences if s.sample]


def found(outcome: StepOutcome) -> list[tuple[str, int]]:
    return [(token.request_id, token.index) for token in outcome.tokens]


def test_a_step_goes_on_with_tokens_that_only_the_ranks_know() -> None:
    scheduler = make()
    for name, arrival_s in (("a", 0.0), ("b", 1.0)):
        join(scheduler, sequence(name, arrival_s=arrival_s))
    first = launch(scheduler)
    assert parts(first) == [("a", (7,), 5, None, 1), ("b", (7,), 5, None, 1)]
    second = launch(scheduler)
    assert parts(second) == [("a", (0,), 6, 0, 2), ("b", (0,), 6, 1, 2)]
    # Two in flight are enough.
    assert scheduler.schedule() == (None, [])
    join(scheduler, sequence("c", arrival_s=0.5), token_id=3)
    assert found(scheduler.update(first, answer(first))) == [("a", 1), ("b", 1)]
    third = launch(scheduler)
    # By age, and by their places in the step before.
    assert parts(third) == [("a", (0,), 7, 0, 3), ("c", (3,), 5, None, 1), ("b", (0,), 7, 1, 3)]
    assert found(scheduler.update(second, answer(second))) == [("a", 2), ("b", 2)]
    assert found(scheduler.update(third, answer(third))) == [("a", 3), ("c", 1), ("b", 3)]


@pytest.mark.parametrize("limit", ["max_tokens", "max_context"])
def test_a_last_token_that_can_be_foreseen_is_not_followed(limit: str) -> None:
    scheduler = make()
    scheduler.stop.max_context = 64 if limit == "max_tokens" else 8
    join(scheduler, sequence("a", max_tokens=3 if limit == "max_tokens" else 20))
    first, second = launch(scheduler), launch(scheduler)
    assert scheduler.update(first, answer(first)).ended == []
    # The one in flight is the third token, the context's eighth.
    assert scheduler.schedule() == (None, [])
    (ended,) = scheduler.update(second, answer(second)).ended
    assert ended[1] == "length"
    assert ended[0].num_output == 3
    assert scheduler.schedule() == (None, [])
    assert scheduler.cache.pool.num_free == NUM_BLOCKS


def test_an_end_token_drops_what_was_computed_behind_it() -> None:
    scheduler = make(prefix_cache=True)
    join(scheduler, sequence("a", length=6))
    join(scheduler, sequence("b", length=6, arrival_s=1.0))
    first, second = launch(scheduler), launch(scheduler)
    outcome = scheduler.update(first, answer(first, a=EOS))
    assert [(s.request.request_id, reason) for s, reason in outcome.ended] == [("a", "stop")]
    assert ("a", 0) not in scheduler
    scheduler.cache.check_integrity()
    third = launch(scheduler)
    # b's place in the step before is still the second: a's token is there, for nobody.
    assert parts(third) == [("b", (0,), 8, 1, 3)]
    # Seven tokens of a are known and computed: what the step in flight writes is in a block that nobody can find.
    ids = (*range(6), 7, EOS, 7)
    assert len(scheduler.cache.prefix.match(ids)[0]) == 1  # type: ignore[union-attr]
    assert found(scheduler.update(second, answer(second))) == [("b", 2)]
    assert found(scheduler.update(third, answer(third))) == [("b", 3)]


def test_a_sequence_that_is_cancelled_in_flight_gets_no_token() -> None:
    scheduler = make()
    join(scheduler, sequence("a"))
    first, second = launch(scheduler), launch(scheduler)
    assert scheduler.remove(("a", 0)) is not None
    assert scheduler.cache.pool.num_free == NUM_BLOCKS
    # Another attempt under the same name is another sequence.
    join(scheduler, sequence("a"))
    third_before = scheduler.running[0].num_computed
    for plan in (first, second):
        assert scheduler.update(plan, answer(plan)) == StepOutcome()
    assert scheduler.running[0].num_computed == third_before
    assert parts(launch(scheduler)) == [("a", (7,), 5, None, 1)]


def test_a_history_lacks_the_token_in_flight_alone() -> None:
    """Which the rank that chooses adds."""

    def history(plan: StepPlan) -> tuple[int, ...]:
        assert plan.sequences[1].sample is not None
        return plan.sequences[1].sample.output_ids

    scheduler = make()
    join(scheduler, sequence("plain"))
    join(scheduler, sequence("penal", arrival_s=1.0, frequency_penalty=1.0))
    first, second = launch(scheduler), launch(scheduler)
    assert (first.sequences[1].follows, history(first)) == (None, (7,))
    assert (second.sequences[1].follows, history(second)) == (1, (7,))
    scheduler.update(first, answer(first, 8))
    assert history(launch(scheduler)) == (7, 8)


def test_blocks_that_run_out_wait_for_the_result_before_anyone_is_sent_away() -> None:
    scheduler = make(num_blocks=4)
    join(scheduler, sequence("old", length=6))
    join(scheduler, sequence("young", length=6, arrival_s=1.0))
    indexes: dict[str, list[int]] = {"old": [], "young": []}
    flying: list[StepPlan] = []
    while True:
        plan, sent_away = scheduler.schedule()
        if sent_away:
            break
        if plan is not None:
            flying.append(plan)
            continue
        oldest = flying.pop(0)
        for token in scheduler.update(oldest, answer(oldest)).tokens:
            indexes[token.request_id].append(token.index)
    assert flying == []
    # Eight tokens of each fit; every token that was computed has been taken in.
    assert indexes == {"old": [1, 2], "young": [1, 2]}
    assert [(s.request.request_id, s.num_output) for s in sent_away] == [("young", 3)]
    assert plan is not None
    assert parts(plan) == [("old", (7,), 8, None, 3)]
    scheduler.cache.check_integrity()


def test_nothing_is_planned_behind_a_prompt_and_a_prompt_may_be_planned_behind_a_step() -> None:
    scheduler = make(computes_prompts=True)
    scheduler.add_prompt(sequence("a", length=4))
    first = launch(scheduler)
    assert scheduler.schedule() == (None, [])
    scheduler.update(first, answer(first))
    second = launch(scheduler)
    scheduler.add_prompt(sequence("b", length=20, arrival_s=1.0))
    third = launch(scheduler)
    assert [(s.request_id, s.num_new_tokens, s.follows) for s in third.sequences] == [("a", 1, 0), ("b", 15, None)]
    scheduler.update(second, answer(second))
    assert scheduler.schedule() == (None, [])
    scheduler.update(third, answer(third))
    fourth = launch(scheduler)
    assert [(s.request_id, s.num_new_tokens, s.follows) for s in fourth.sequences] == [("a", 1, None), ("b", 5, None)]


def test_a_failed_step_leaves_its_sequences_to_be_ended_or_planned_again() -> None:
    scheduler = make()
    join(scheduler, sequence("a"))
    first = launch(scheduler)
    join(scheduler, sequence("b", arrival_s=1.0))
    second = launch(scheduler)
    assert [s.request.request_id for s in scheduler.withdraw(first)] == ["a"]
    scheduler.remove(("a", 0))
    assert [s.request.request_id for s in scheduler.withdraw(second)] == ["b"]
    assert parts(launch(scheduler)) == [("b", (7,), 5, None, 1)]


@pytest.mark.parametrize("computes_prompts", [True, False], ids=["colocated", "split"])
@pytest.mark.parametrize("seed", range(8))
def test_by_chance_each_token_comes_once_and_every_block_returns(seed: int, computes_prompts: bool) -> None:
    """Ranks are played by a function of (name, index); what follows is filled in as they do."""
    dice = random.Random(seed)
    scheduler = make(num_blocks=9, computes_prompts=computes_prompts, prefix_cache=True)
    given = {
        f"r{n}": sequence(f"r{n}", length=dice.randrange(1, 12), arrival_s=float(n), max_tokens=dice.randrange(1, 16))
        for n in range(12)
    }
    waiting = list(given.values())
    flying: list[StepPlan] = []
    sampled: list[int] = []
    tokens: dict[str, list[int]] = {name: [] for name in given}
    fates: dict[str, str] = {}

    def token_of(name: str, index: int) -> int:
        return EOS if (int(name[1:]) + 7 * index) % 13 == 0 else 1 + (index * 5 + len(name)) % 90

    def note(outcome: StepOutcome) -> None:
        for token in outcome.tokens:
            assert token.index == len(tokens[token.request_id])
            assert token.token_id == token_of(token.request_id, token.index)
            tokens[token.request_id].append(token.token_id)
        for item, reason in outcome.ended:
            assert fates.setdefault(item.request.request_id, reason) is reason

    for _ in range(2000):
        if len(fates) == len(given):
            break
        if waiting and dice.random() < 0.4:
            item = waiting.pop(0)
            name = item.request.request_id
            if computes_prompts:
                scheduler.add_prompt(item)
            elif scheduler.cache.can_admit(item.tokens, item.num_tokens + 1):
                item.hold(scheduler.cache.admit(item.key, item.tokens, item.num_tokens + 1))
                note(scheduler.join(item, SampledToken(request_id=name, epoch=0, index=0, token_id=token_of(name, 0))))
            else:
                waiting.insert(0, item)
        running = [name for name in given if (name, 0) in scheduler]
        if running and dice.random() < 0.02:
            name = dice.choice(running)
            scheduler.remove((name, 0))
            fates[name] = "cancelled"
        plan, sent_away = scheduler.schedule()
        for item in sent_away:
            assert fates.setdefault(item.request.request_id, "preempted") == "preempted"
        if plan is not None:
            drawn = []
            for part in plan.sequences:
                known = [*given[part.request_id].request.prompt_ids]
                new = part.token_ids if part.follows is None else (sampled[part.follows],)
                for position, token_id in enumerate(new, part.start):
                    output = position - len(known)
                    assert token_id == (known[position] if output < 0 else token_of(part.request_id, output))
                if part.sample is not None:
                    assert part.sample.index == part.context_len - len(known)
                    drawn.append(token_of(part.request_id, part.sample.index))
            sampled = drawn
            flying.append(plan)
        if flying and (plan is None or dice.random() < 0.6):
            landed = flying.pop(0)
            note(
                scheduler.update(
                    landed,
                    StepResult(
                        step=landed.step,
                        tokens=tuple(
                            SampledToken(
                                request_id=s.request_id,
                                epoch=0,
                                index=s.sample.index,
                                token_id=token_of(s.request_id, s.sample.index),
                            )
                            for s in landed.sequences
                            if s.sample is not None
                        ),
                    ),
                )
            )
        scheduler.cache.check_integrity()
    assert set(fates) == set(given)
    assert scheduler.cache.pool.num_free == 9
