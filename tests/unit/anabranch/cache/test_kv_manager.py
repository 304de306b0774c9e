from __future__ import annotations

import random

import pytest

from anabranch.cache.block_table import BlockTable
from anabranch.cache.kv_manager import KvCacheManager
from anabranch.errors import OutOfBlocks

pytestmark = pytest.mark.unit

KEY = ("request", 0)


def test_admits_what_fits_and_takes_nothing_otherwise() -> None:
    cache = KvCacheManager(num_blocks=4, block_size=4)
    assert cache.fits(16)
    assert not cache.fits(17)
    prompt = list(range(10))
    assert cache.can_admit(prompt, 11)
    table = cache.admit(KEY, prompt, 11)
    assert (len(table), table.num_tokens, table.num_cached_tokens) == (3, 12, 0)
    assert not cache.can_admit(prompt, 11)
    with pytest.raises(OutOfBlocks):
        cache.admit(("other", 0), prompt, 11)
    assert cache.stats().num_free_blocks == 1
    cache.check_integrity()


def test_spare_blocks_are_left_to_others() -> None:
    cache = KvCacheManager(num_blocks=4, block_size=4)
    assert cache.can_admit(range(8), 8, spare_blocks=2)
    assert not cache.can_admit(range(8), 8, spare_blocks=3)


def test_a_finished_prompt_serves_the_next_one() -> None:
    cache = KvCacheManager(num_blocks=8, block_size=4)
    prompt = list(range(10))
    table = cache.admit(KEY, prompt, 10)
    cache.publish(table, prompt, 6)
    cache.publish(table, prompt, 10)
    blocks = table.block_ids
    cache.release(table)
    assert cache.stats().num_free_blocks == 8
    assert cache.stats().num_idle_blocks == 2
    again = cache.admit(("again", 0), prompt, 10)
    assert again.num_cached_tokens == 8
    assert again.block_ids[:2] == blocks[:2]
    stats = cache.stats()
    assert (stats.num_queried_tokens, stats.num_hit_tokens) == (20, 8)
    cache.check_integrity()


def test_nothing_is_shared_before_it_is_computed() -> None:
    cache = KvCacheManager(num_blocks=8, block_size=4)
    prompt = list(range(10))
    table = cache.admit(KEY, prompt, 10)
    cache.publish(table, prompt, 3)
    assert cache.admit(("other", 0), prompt, 10).num_cached_tokens == 0


def test_without_prefix_cache_nothing_is_shared() -> None:
    cache = KvCacheManager(num_blocks=8, block_size=4, prefix_cache=False)
    prompt = list(range(10))
    table = cache.admit(KEY, prompt, 10)
    cache.publish(table, prompt, 10)
    assert cache.admit(("other", 0), prompt, 10).num_cached_tokens == 0
    cache.release(table)
    assert cache.stats().num_idle_blocks == 0
    cache.check_integrity()


def test_a_hit_makes_room_that_a_miss_would_not_have() -> None:
    cache = KvCacheManager(num_blocks=4, block_size=4)
    prompt = list(range(13))
    first = cache.admit(KEY, prompt, 13)
    cache.publish(first, prompt, 13)
    assert cache.stats().num_free_blocks == 0
    assert not cache.can_admit(prompt, 13)
    cache.release(first)
    assert cache.can_admit(prompt, 13)
    # Idle blocks that would be shared are not room for anything else.
    assert not cache.can_admit(prompt, 17)
    held = cache.admit(KEY, prompt, 12)
    assert held.num_cached_tokens == 12
    assert cache.can_admit(prompt, 13), "three blocks are shared with the holder, one is left"
    assert cache.admit(("other", 0), prompt, 13).block_ids[:3] == held.block_ids
    cache.check_integrity()


def test_growing_is_asked_for_and_refused_without_harm() -> None:
    cache = KvCacheManager(num_blocks=2, block_size=4)
    table = cache.admit(KEY, [1], 1)
    assert cache.grow(table, 4)
    assert len(table) == 1
    assert cache.grow(table, 5)
    assert not cache.grow(table, 9)
    assert len(table) == 2


def test_growing_takes_idle_blocks_from_the_prefix_cache() -> None:
    cache = KvCacheManager(num_blocks=3, block_size=4)
    old = cache.admit(KEY, list(range(8)), 8)
    cache.publish(old, list(range(8)), 8)
    cache.release(old)
    table = cache.admit(("new", 0), [70], 1)
    assert cache.grow(table, 12)
    assert not cache.can_admit([1], 1)
    cache.check_integrity()
    cache.release(table)
    assert cache.admit(("again", 0), list(range(8)), 8).num_cached_tokens == 0


def test_release_is_idempotent() -> None:
    cache = KvCacheManager(num_blocks=2, block_size=4)
    table = cache.admit(KEY, [1], 8)
    cache.release(table)
    cache.release(table)
    assert cache.stats().num_free_blocks == 2
    assert cache.stats().num_tables == 0


def test_integrity_finds_a_leak() -> None:
    cache = KvCacheManager(num_blocks=2, block_size=4)
    cache.pool.allocate(1)
    with pytest.raises(AssertionError, match="1 references and 0 holders"):
        cache.check_integrity()


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_random_lives_end_where_they_began_and_never_share_wrongly(prefix_cache: bool) -> None:
    """Blocks remember which tokens were written to them; every admitted prefix must read its own."""
    rng = random.Random(7)
    size, num_blocks = 4, 24
    cache = KvCacheManager(num_blocks=num_blocks, block_size=size, prefix_cache=prefix_cache)
    content: dict[int, tuple[int, ...]] = {}
    live: list[tuple[BlockTable, list[int], int]] = []
    hits = 0
    for step in range(3000):
        action = rng.random()
        if action < 0.4:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 40))]
            wanted = len(tokens) + rng.randrange(2)
            if not cache.can_admit(tokens, wanted):
                with pytest.raises(OutOfBlocks):
                    cache.admit(("r", step), tokens, wanted)
                continue
            table = cache.admit(("r", step), tokens, wanted)
            for place in range(table.num_cached_tokens // size):
                assert content[table.block_ids[place]] == tuple(tokens[: (place + 1) * size])
            hits += table.num_cached_tokens > 0
            assert table.num_cached_tokens < len(tokens)
            live.append((table, tokens, table.num_cached_tokens))
        elif action < 0.8 and live:
            place = rng.randrange(len(live))
            table, tokens, done = live[place]
            if done == len(tokens):
                tokens.append(rng.randrange(2))
                if not cache.grow(table, len(tokens)):
                    cache.release(table)
                    live.pop(place)
                    continue
            done = rng.randrange(done + 1, len(tokens) + 1)
            for block in range(done // size):
                if content.get(table.block_ids[block]) != tuple(tokens[: (block + 1) * size]):
                    assert cache.pool.references(table.block_ids[block]) == 1, "a shared block is never written"
                    content[table.block_ids[block]] = tuple(tokens[: (block + 1) * size])
            cache.publish(table, tokens, done)
            live[place] = (table, tokens, done)
        elif live:
            cache.release(live.pop(rng.randrange(len(live)))[0])
        if step % 50 == 0:
            cache.check_integrity()
    for table, _, _ in live:
        cache.release(table)
    cache.check_integrity()
    assert cache.stats().num_free_blocks == num_blocks
    assert (hits > 50) == prefix_cache
