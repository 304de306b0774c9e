"""Sequences join, grow, finish, and are preempted when blocks run out."""

from functools import partial

import pytest

from tests.support.schedules import EOS, answer, join, scheduler
from tests.support.schedules import sequence as any_sequence

pytestmark = pytest.mark.unit

make = partial(scheduler, computes_prompts=True)
sequence = partial(any_sequence, max_tokens=8)


def test_a_prompt_is_computed_then_decoded_to_its_length() -> None:
    scheduler = make()
    scheduler.add_prompt(sequence("a", 20, 0.0, max_tokens=3))
    shapes, ended = [], []
    while (plan := scheduler.schedule()[0]) is not None:
        shapes.append([(s.start, s.num_new_tokens) for s in plan.sequences])
        outcome = scheduler.update(plan, answer(plan))
        ended += outcome.ended
    assert shapes == [[(0, 16)], [(16, 4)], [(20, 1)], [(21, 1)]]
    assert [(s.key, reason) for s, reason in ended] == [(("a", 0), "length")]
    assert scheduler.cache.pool.num_free == 16


def test_a_running_sequence_goes_on_while_a_prompt_is_computed_in_the_same_step() -> None:
    scheduler = make(max_step_tokens=8)
    scheduler.add_prompt(sequence("a", 4, 0.0))
    plan, _ = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, answer(plan))
    scheduler.add_prompt(sequence("b", 12, 1.0))
    plan, _ = scheduler.schedule()
    assert plan is not None
    assert [(s.request_id, s.num_new_tokens) for s in plan.sequences] == [("a", 1), ("b", 7)]


def test_an_imported_sequence_continues_after_its_first_token() -> None:
    scheduler = make(computes_prompts=False)
    join(scheduler, sequence("a", 5, 0.0))
    plan, sent_away = scheduler.schedule()
    assert plan is not None
    assert sent_away == []
    assert [(s.start, s.token_ids, s.sample.index) for s in plan.sequences if s.sample] == [(5, (7,), 1)]


def test_a_first_token_that_ends_the_answer_never_runs() -> None:
    scheduler = make(computes_prompts=False)
    join(scheduler, sequence("a", 5, 0.0), token_id=EOS)
    assert scheduler.schedule() == (None, [])
    assert len(scheduler) == 0
    assert scheduler.cache.pool.num_free == 16


def test_the_youngest_gives_way_and_leaves_a_split_worker() -> None:
    scheduler = make(num_blocks=4, computes_prompts=False)
    join(scheduler, sequence("old", 6, 0.0, max_tokens=10))
    join(scheduler, sequence("young", 6, 1.0, max_tokens=10))
    away = []
    while not away:
        plan, away = scheduler.schedule()
        assert plan is not None
        scheduler.update(plan, answer(plan))
    assert [s.request.request_id for s in away] == ["young"]
    assert [s.request.request_id for s in scheduler.running] == ["old"]
    assert away[0].table is None
    scheduler.cache.check_integrity()


def test_a_colocated_worker_computes_a_preempted_sequence_again_with_its_tokens() -> None:
    scheduler = make(num_blocks=5)
    scheduler.add_prompt(sequence("old", 7, 0.0, max_tokens=6))
    scheduler.add_prompt(sequence("young", 7, 1.0, max_tokens=6))
    lengths: dict[str, int] = {}
    indexes: dict[str, list[int]] = {"old": [], "young": []}
    for _ in range(100):
        plan, away = scheduler.schedule()
        assert away == []
        if plan is None:
            break
        outcome = scheduler.update(plan, answer(plan))
        for token in outcome.tokens:
            indexes[token.request_id].append(token.index)
        lengths.update({s.request.request_id: s.num_output for s, _ in outcome.ended})
    assert scheduler.num_preempted > 0
    assert indexes == {"old": [0, 1, 2, 3, 4, 5], "young": [0, 1, 2, 3, 4, 5]}
    assert lengths == {"old": 6, "young": 6}
    assert scheduler.cache.pool.num_free == 5


def test_removal_frees_blocks_in_every_stage() -> None:
    scheduler = make(max_step_tokens=4)
    scheduler.add_prompt(sequence("waiting", 40, 2.0))
    scheduler.add_prompt(sequence("computing", 8, 0.0))
    plan, _ = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, answer(plan))
    for name in ("waiting", "computing"):
        assert scheduler.remove((name, 0)) is not None
    assert scheduler.remove(("computing", 0)) is None
    assert scheduler.schedule() == (None, [])
    assert scheduler.cache.pool.num_free == 16
    scheduler.cache.check_integrity()
