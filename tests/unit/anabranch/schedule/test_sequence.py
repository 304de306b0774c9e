"""A sequence's way through an engine: what each step computes, and what sampling is told."""

from __future__ import annotations

import pytest

from anabranch.cache.kv_manager import KvCacheManager
from anabranch.request.request import Request
from anabranch.request.sampling_params import SamplingParams
from anabranch.schedule.sequence import Sequence

pytestmark = pytest.mark.unit


def sequence(
    prompt: tuple[int, ...] = tuple(range(10, 20)), output: tuple[int, ...] = (), **sampling: object
) -> Sequence:
    request = Request(
        request_id="a",
        epoch=2,
        prompt_ids=prompt,
        output_ids=output,
        sampling=SamplingParams(max_tokens=8, **sampling),  # type: ignore[arg-type]
    )
    return Sequence(request, arrival_s=1.0)


def held(item: Sequence, cache: KvCacheManager | None = None) -> Sequence:
    cache = cache or KvCacheManager(num_blocks=8, block_size=4)
    item.hold(cache.admit(item.key, item.tokens, item.num_tokens))
    return item


def test_only_the_last_chunk_samples() -> None:
    item = held(sequence())
    plan = item.plan(6)
    assert (plan.request_id, plan.epoch, plan.token_ids, plan.start, plan.sample) == (
        "a",
        2,
        (10, 11, 12, 13, 14, 15),
        0,
        None,
    )
    assert len(plan.block_ids) == 3
    item.num_computed += 6
    plan = item.plan(4)
    assert (plan.token_ids, plan.start, plan.context_len) == ((16, 17, 18, 19), 6, 10)
    assert plan.sample is not None
    assert plan.sample.index == 0


def test_a_sampled_token_is_the_next_steps_input() -> None:
    item = held(sequence())
    item.plan(10)
    item.num_computed = 10
    item.append(77)
    assert (item.num_output, item.num_remaining) == (1, 1)
    plan = item.plan(1)
    assert (plan.token_ids, plan.start) == ((77,), 10)
    assert plan.sample is not None
    assert plan.sample.index == 1


def test_a_later_epoch_computes_the_answer_so_far_and_goes_on_behind_it() -> None:
    item = held(sequence(output=(70, 71, 72)))
    assert (item.num_tokens, item.num_output) == (13, 3)
    plan = item.plan(13)
    assert plan.token_ids[-3:] == (70, 71, 72)
    assert plan.sample is not None
    assert plan.sample.index == 3


def test_penalties_are_told_what_came_before() -> None:
    item = held(sequence(prompt=(1, 2), output=(3,), repetition_penalty=1.5))
    item.num_computed = 3
    item.append(4)
    sample = item.plan(1).sample
    assert sample is not None
    assert (sample.prompt_ids, sample.output_ids) == ((1, 2), (3, 4))
    plain = held(sequence(prompt=(1, 2), output=(3,))).plan(3).sample
    assert plain is not None
    assert (plain.prompt_ids, plain.output_ids) == ((), ())


def test_cached_tokens_count_as_computed_and_are_forgotten_with_the_blocks() -> None:
    cache = KvCacheManager(num_blocks=8, block_size=4)
    first = held(sequence(), cache)
    assert first.table is not None
    cache.publish(first.table, first.tokens, 10)
    second = held(sequence(), cache)
    assert (second.num_cached_tokens, second.num_remaining) == (8, 2)
    assert second.plan(2).start == 8
    table = second.let_go()
    assert table is not None
    assert (second.table, second.num_remaining) == (None, 10)
    assert second.let_go() is None


def test_times_are_zero_until_there_is_something_to_measure() -> None:
    item = held(sequence())
    assert (item.queue_s, item.prefill_s) == (0.0, 0.0)
    item.plan(5)
    assert item.queue_s > 0.0
    started_s = item.started_s
    item.plan(5)
    assert item.started_s == started_s
    assert item.prefill_s == 0.0
    item.append(1)
    first_token_s = item.first_token_s
    item.append(2)
    assert item.first_token_s == first_token_s
    assert item.prefill_s >= 0.0


@pytest.mark.parametrize("num_new", [0, 11])
def test_a_step_computes_at_least_one_token_and_no_more_than_remain(num_new: int) -> None:
    with pytest.raises(AssertionError):
        held(sequence()).plan(num_new)
