"""Chunks are dealt out oldest first, and blocks come back with the first token."""

import pytest

from anabranch.cache.kv_manager import KvCacheManager
from prefill.scheduler import PrefillScheduler
from tests.support.schedules import answer, sequence

pytestmark = pytest.mark.unit


def make(num_blocks: int = 8, max_step_tokens: int = 8, max_running: int = 4) -> PrefillScheduler:
    cache = KvCacheManager(num_blocks=num_blocks, block_size=4)
    return PrefillScheduler(cache, max_step_tokens=max_step_tokens, max_running=max_running)


def test_a_long_prompt_takes_several_steps_and_samples_in_the_last() -> None:
    scheduler = make()
    scheduler.add(sequence("a", 18))
    spans = []
    while (plan := scheduler.schedule()) is not None:
        spans.append([(s.start, s.num_new_tokens, s.sample is not None) for s in plan.sequences])
        finished = scheduler.update(plan, answer(plan))
    assert spans == [[(0, 8, False)], [(8, 8, False)], [(16, 2, True)]]
    assert [(sequence.key, token.token_id) for sequence, token in finished] == [(("a", 0), 7)]
    assert len(scheduler) == 0
    assert scheduler.cache.pool.num_free == 8


def test_short_prompts_share_a_step_up_to_its_tokens() -> None:
    scheduler = make()
    for name, length, first in (("a", 3, 0), ("b", 4, 10), ("c", 5, 20)):
        scheduler.add(sequence(name, length, first=first))
    plan = scheduler.schedule()
    assert plan is not None
    assert [(s.request_id, s.num_new_tokens) for s in plan.sequences] == [("a", 3), ("b", 4), ("c", 1)]
    assert [s.key[0] for s, _ in scheduler.update(plan, answer(plan))] == ["a", "b"]


def test_no_prompt_overtakes_one_that_waits_for_blocks() -> None:
    scheduler = make(num_blocks=4)
    scheduler.add(sequence("big", 12))
    scheduler.add(sequence("bigger", 16, first=100))
    scheduler.add(sequence("small", 2, first=200))
    plan = scheduler.schedule()
    assert plan is not None
    assert [s.request_id for s in plan.sequences] == ["big"]
    scheduler.update(plan, answer(plan))
    plan = scheduler.schedule()
    assert plan is not None
    assert [s.request_id for s in plan.sequences] == ["big"]
    scheduler.update(plan, answer(plan))
    plan = scheduler.schedule()
    assert plan is not None
    assert [s.request_id for s in plan.sequences] == ["bigger"]


def test_a_second_prompt_that_begins_alike_computes_only_the_rest() -> None:
    scheduler = make(max_step_tokens=32)
    scheduler.add(sequence("a", 10))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, answer(plan))
    scheduler.add(sequence("b", 11))
    plan = scheduler.schedule()
    assert plan is not None
    assert [(s.start, s.num_new_tokens) for s in plan.sequences] == [(8, 3)]


@pytest.mark.parametrize("steps_before", [0, 1, 2])
def test_removal_at_every_stage_frees_the_blocks(steps_before: int) -> None:
    scheduler = make()
    scheduler.add(sequence("a", 30))
    for _ in range(steps_before):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.update(plan, answer(plan))
    assert scheduler.remove(("a", 0)) is not None
    assert scheduler.remove(("a", 0)) is None
    assert scheduler.schedule() is None
    assert scheduler.cache.pool.num_free == 8
    scheduler.cache.check_integrity()


def test_a_step_result_for_a_removed_sequence_is_dropped() -> None:
    scheduler = make()
    scheduler.add(sequence("a", 4))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.remove(("a", 0))
    assert scheduler.update(plan, answer(plan)) == []
