"""Lanes: steps that follow their own last step alone, and blocks that no step writes to once others have them."""

from __future__ import annotations

import random
from collections import deque
from functools import partial

import pytest

from anabranch.schedule.generation import GenerationScheduler
from anabranch.step.plan import StepPlan
from tests.support.schedules import BLOCK, EOS, answer, join, scheduler, sequence

pytestmark = pytest.mark.unit

make = partial(scheduler, computes_prompts=False)


def launch(scheduler: GenerationScheduler) -> StepPlan:
    plan, sent_away = scheduler.schedule()
    assert plan is not None
    assert sent_away == []
    return plan


def names(plan: StepPlan) -> list[str]:
    return [sequence.request_id for sequence in plan.sequences]


def test_sequences_are_dealt_to_the_lane_with_the_fewest() -> None:
    scheduler = make(lanes=2)
    for index, name in enumerate("abc"):
        join(scheduler, sequence(name, arrival_s=index))
    first, second = launch(scheduler), launch(scheduler)
    assert (first.lane, names(first)) == (0, ["a", "c"])
    assert (second.lane, names(second)) == (1, ["b"])


def test_a_lane_follows_its_own_last_step_whatever_the_other_does() -> None:
    scheduler = make(lanes=2)
    join(scheduler, sequence("a"))
    join(scheduler, sequence("b", arrival_s=1.0))
    plans = [launch(scheduler) for _ in range(4)]
    assert [plan.lane for plan in plans] == [0, 1, 0, 1]
    assert [plan.sequences[0].follows for plan in plans] == [None, None, 0, 0]
    assert scheduler.schedule() == (None, [])
    # The second lane runs through, while the first one's steps are out.
    scheduler.update(plans[1], answer(plans[1]))
    third = launch(scheduler)
    assert third.lane == 1
    scheduler.update(plans[3], answer(plans[3]))
    assert launch(scheduler).lane == 1
    assert [sequence.num_output for sequence in scheduler.running] == [1, 3]
    outcome = scheduler.update(plans[0], answer(plans[0]))
    assert [(token.request_id, token.index) for token in outcome.tokens] == [("a", 1)]


def test_a_lane_without_sequences_plans_nothing() -> None:
    scheduler = make(lanes=4)
    join(scheduler, sequence("a"))
    assert launch(scheduler).lane == 0
    assert launch(scheduler).lane == 0
    assert scheduler.schedule() == (None, [])


def test_blocks_that_a_step_may_write_to_are_given_back_at_its_end() -> None:
    scheduler = make(lanes=2)
    join(scheduler, sequence("a", length=BLOCK))
    join(scheduler, sequence("b", length=BLOCK, arrival_s=1.0))
    pool = scheduler.cache.pool
    first, second, ahead = (launch(scheduler) for _ in range(3))
    held = pool.num_blocks - pool.num_free
    assert scheduler.remove(("a", 0)) is not None
    assert ("a", 0) not in scheduler
    # Both steps of its lane know its blocks; the later one gives them back.
    assert pool.num_blocks - pool.num_free == held
    scheduler.update(first, answer(first))
    assert pool.num_blocks - pool.num_free == held
    scheduler.withdraw(ahead)
    assert pool.num_blocks - pool.num_free == held - 2
    scheduler.update(second, answer(second))
    scheduler.cache.check_integrity()


def test_with_one_lane_blocks_are_given_back_at_once() -> None:
    scheduler = make()
    join(scheduler, sequence("a", length=BLOCK))
    launch(scheduler)
    scheduler.remove(("a", 0))
    assert scheduler.cache.pool.num_free == scheduler.cache.pool.num_blocks


def test_who_runs_out_of_blocks_waits_until_nothing_is_in_flight() -> None:
    scheduler = make(num_blocks=4, lanes=2)
    join(scheduler, sequence("a", length=2 * BLOCK - 1))
    join(scheduler, sequence("b", length=2 * BLOCK - 1, arrival_s=1.0))
    first, second = launch(scheduler), launch(scheduler)
    # The next token of either needs a block, and there is none.
    assert scheduler.schedule() == (None, [])
    scheduler.update(first, answer(first))
    assert scheduler.schedule() == (None, [])
    scheduler.update(second, answer(second))
    plan, sent_away = scheduler.schedule()
    assert plan is not None
    assert names(plan) == ["a"]
    assert [item.request.request_id for item in sent_away] == ["b"]


def test_another_number_of_lanes_is_dealt_once_nothing_is_in_flight() -> None:
    scheduler = make(lanes=4)
    scheduler.deal(2)
    for index, name in enumerate("abcd"):
        join(scheduler, sequence(name, arrival_s=index))
    first, second = launch(scheduler), launch(scheduler)
    assert (names(first), names(second)) == (["a", "c"], ["b", "d"])
    scheduler.deal(3)
    assert scheduler.schedule() == (None, [])
    scheduler.update(second, answer(second))
    assert scheduler.schedule() == (None, [])
    scheduler.update(first, answer(first))
    plans = [launch(scheduler) for _ in range(3)]
    assert sorted(names(plan) for plan in plans) == [["a", "d"], ["b"], ["c"]]
    assert all(part.follows is None for plan in plans for part in plan.sequences)
    scheduler.deal(3)
    assert launch(scheduler).sequences[0].follows == 0


@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(15))
def test_any_order_of_ends_gives_each_sequence_its_tokens(lanes: int, seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make(num_blocks=14, lanes=lanes, prefix_cache=bool(seed % 2))
    flights: list[deque[StepPlan]] = [deque() for _ in range(lanes)]
    waiting = [
        sequence(f"s{i}", length=rng.randint(1, 9), arrival_s=i, max_tokens=rng.randint(2, 9)) for i in range(20)
    ]
    tokens: dict[str, list[int]] = {}
    ended: set[str] = set()
    for _ in range(3000):
        choice = rng.random()
        if waiting and choice < 0.2 and scheduler.num_places:
            item = waiting[0]
            if scheduler.cache.can_admit(item.tokens, item.num_tokens + 1, 1):
                waiting.pop(0)
                tokens[item.request.request_id] = [0]
                join(scheduler, item)
        elif choice < 0.25 and scheduler.running:
            name = rng.choice(scheduler.running).request.request_id
            scheduler.remove((name, 0))
            ended.add(name)
        elif choice < 0.26:
            scheduler.deal(rng.randint(1, lanes))
        elif choice < 0.6:
            plan, sent_away = scheduler.schedule()
            ended |= {item.request.request_id for item in sent_away}
            if plan is not None:
                flights[plan.lane].append(plan)
                for part in plan.sequences:
                    block = part.block_ids[part.start // BLOCK]
                    others = {
                        other.request_id
                        for lane in flights
                        for flight in lane
                        if flight.lane != plan.lane
                        for other in flight.sequences
                        if other.block_ids[other.start // BLOCK] == block
                    }
                    assert not others, f"block {block} is written by {part.request_id} and {others}"
        elif any(flights):
            lane = rng.choice([lane for lane in flights if lane])
            plan = lane.popleft()
            ends = {part.request_id: EOS for part in plan.sequences if rng.random() < 0.05}
            outcome = scheduler.update(plan, answer(plan, **ends))
            for token in outcome.tokens:
                assert token.index == len(tokens[token.request_id])
                tokens[token.request_id].append(token.token_id)
            ended |= {item.request.request_id for item, _ in outcome.ended}
        scheduler.cache.check_integrity()
    assert len(ended) + len(scheduler.running) == len(tokens)
    assert len(ended) > 10
