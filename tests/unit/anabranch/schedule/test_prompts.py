"""The queue of prompts: first come, first served, in chunks, within tokens, places and blocks."""

from __future__ import annotations

import pytest

from anabranch.cache.kv_manager import KvCacheManager
from anabranch.schedule.prompts import PromptQueue
from tests.support.schedules import sequence

pytestmark = pytest.mark.unit


def queue(num_blocks: int = 8) -> PromptQueue:
    return PromptQueue(KvCacheManager(num_blocks=num_blocks, block_size=4))


def chosen(prompts: PromptQueue, max_tokens: int, max_sequences: int = 8) -> list[tuple[str, int]]:
    """The next chunks, computed."""
    chunks = prompts.next_chunks(max_tokens, max_sequences)
    for item, num_new in chunks:
        prompts.computed(item, num_new)
    return [(item.request.request_id, num_new) for item, num_new in chunks]


def test_the_oldest_gets_its_chunk_first_and_the_rest_goes_to_the_next() -> None:
    prompts = queue()
    for name, length, first in (("a", 10, 0), ("b", 5, 20), ("c", 3, 40)):
        prompts.add(sequence(name, length, first=first))
    assert prompts.queued_tokens == 18
    assert chosen(prompts, 8) == [("a", 8)]
    assert prompts.queued_tokens == 10
    assert chosen(prompts, 8) == [("a", 2), ("b", 5), ("c", 1)]
    assert chosen(prompts, 8) == [("c", 2)]
    assert (len(prompts), prompts.queued_tokens) == (0, 0)
    assert chosen(prompts, 8) == []


def test_places_are_limited() -> None:
    prompts = queue()
    for name, first in (("a", 0), ("b", 20), ("c", 40)):
        prompts.add(sequence(name, 2, first=first))
    assert chosen(prompts, 100, max_sequences=2) == [("a", 2), ("b", 2)]
    assert chosen(prompts, 100, max_sequences=0) == []
    assert chosen(prompts, 0) == []
    assert chosen(prompts, 100) == [("c", 2)]


def test_nobody_overtakes_the_head_that_waits_for_blocks() -> None:
    prompts = queue(num_blocks=3)
    holder = sequence("holder", 8)
    prompts.add(holder)
    assert chosen(prompts, 4) == [("holder", 4)]
    prompts.add(sequence("large", 8, first=20))
    prompts.add(sequence("small", 2, first=40))
    assert chosen(prompts, 100) == [("holder", 4)]
    assert chosen(prompts, 100) == []
    table = holder.let_go()
    assert table is not None
    prompts.cache.release(table)
    assert chosen(prompts, 100) == [("large", 8), ("small", 2)]


def test_one_that_was_preempted_goes_before_those_that_wait() -> None:
    prompts = queue()
    prompts.add(sequence("waiting", 2, first=20))
    prompts.put_back(sequence("preempted", 2))
    assert chosen(prompts, 100) == [("preempted", 2), ("waiting", 2)]


def test_removal_while_waiting_and_while_computing() -> None:
    prompts = queue()
    first, second, third = (sequence(name, 6, first=n * 20) for n, name in enumerate("abc"))
    for item in (first, second, third):
        prompts.add(item)
    prompts.next_chunks(4, 8)
    prompts.remove(first)
    prompts.remove(second)
    prompts.remove(second)
    assert (prompts.computing, list(prompts.waiting)) == ([], [third])


def test_what_is_computed_serves_the_next_prompt_that_begins_alike() -> None:
    prompts = queue()
    prompts.add(sequence("first", 10))
    assert chosen(prompts, 9) == [("first", 9)]
    # Full blocks are given at once, before the first prompt is done.
    prompts.add(sequence("second", 10))
    assert chosen(prompts, 100) == [("first", 1), ("second", 2)]


def test_the_whole_prompt_from_the_cache_but_its_last_token() -> None:
    prompts = queue()
    prompts.add(sequence("first", 8))
    assert chosen(prompts, 100) == [("first", 8)]
    prompts.add(sequence("second", 8))
    assert chosen(prompts, 100) == [("second", 4)]
