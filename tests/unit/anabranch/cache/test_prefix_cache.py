from __future__ import annotations

import pytest

from anabranch.cache import prefix_cache
from anabranch.cache.block_pool import BlockPool
from anabranch.cache.prefix_cache import Chain, PrefixCache, block_digest

pytestmark = pytest.mark.unit

SIZE = 4


def published(pool: BlockPool, cache: PrefixCache, token_ids: list[int]) -> list[int]:
    """Blocks that hold `token_ids`, published, held."""
    blocks = pool.allocate(-(-len(token_ids) // SIZE))
    cache.publish(Chain(), blocks, token_ids, len(token_ids))
    return blocks


def test_digests_are_the_same_on_every_machine() -> None:
    first = block_digest(b"", [1, 2, 3, 4])
    assert first.hex() == "903ce79ac359c3eb2de5421794dd19f0"
    assert block_digest(b"", [1, 2, 3, 4]) == first
    assert block_digest(first, [1, 2, 3, 4]) != first
    assert block_digest(b"", [1, 2, 4, 3]) != first


def test_matches_the_longest_prefix_of_full_blocks() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, SIZE)
    blocks = published(pool, cache, list(range(10)))
    assert len(cache) == 2, "the third block is not full"
    assert cache.match(list(range(10)))[0] == blocks[:2]
    assert cache.match([*range(8), 99, 98])[0] == blocks[:2]
    assert cache.match([*range(7), 99, 98])[0] == blocks[:1]
    assert cache.match([99, *range(1, 10)])[0] == []
    assert cache.match([*range(4, 8), 1])[0] == [], "a block in the middle is no prefix"


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_a_token_is_left_to_compute(num_tokens: int, num_blocks: int) -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, SIZE)
    blocks = published(pool, cache, list(range(12)))
    assert cache.match(list(range(num_tokens)))[0] == blocks[:num_blocks]


def test_freed_blocks_are_found_until_they_are_reused() -> None:
    pool = BlockPool(3)
    cache = PrefixCache(pool, SIZE)
    blocks = published(pool, cache, list(range(12)))
    pool.free(blocks)
    assert cache.match(list(range(13)))[0] == blocks
    pool.allocate(1)
    assert cache.match(list(range(13)))[0] == blocks[:2], "the prefix outlives what was built on it"
    cache.check_integrity()


def test_publishing_goes_on_where_a_match_ended() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, SIZE)
    shared = published(pool, cache, list(range(8)))
    tokens = [*range(8), 50, 51, 52, 53, 54]
    found, chain = cache.match(tokens)
    pool.share(found)
    table = [*found, *pool.allocate(2)]
    cache.publish(chain, table, tokens, 11)
    assert chain.num_blocks == 2
    cache.publish(chain, table, tokens, 12)
    assert chain.num_blocks == 3
    assert cache.match(tokens)[0] == [*shared, table[2]]


def test_equal_blocks_are_published_once() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, SIZE)
    tokens = list(range(9))
    first = published(pool, cache, tokens)
    second = published(pool, cache, tokens)
    assert cache.match(tokens)[0] == first[:2]
    assert not any(pool.kept(block) for block in second)
    # What grows out of the second goes on from the first's entries.
    chain = Chain()
    longer = [*range(12), 7]
    cache.publish(chain, second, longer, 12)
    assert cache.match(longer)[0] == [*first[:2], second[2]]


def test_a_child_whose_parent_went_is_replaced() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, SIZE)
    tokens = list(range(8))
    parent, child = published(pool, cache, tokens)
    pool.free([parent])
    pool.allocate(3)  # takes the blank ones and the parent
    assert cache.match([*tokens, 1])[0] == []
    pool.free([child])
    again = pool.allocate(1)
    assert again == [child]
    cache.check_integrity()


def test_an_orphan_gives_way_to_the_same_content_with_a_parent() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, SIZE)
    tokens = list(range(8))
    parent, child = published(pool, cache, tokens)
    pool.free([parent])
    taken = pool.allocate(3)
    pool.free(taken)
    fresh = published(pool, cache, tokens)
    assert cache.match([*tokens, 1])[0] == fresh
    assert not pool.kept(child)
    cache.check_integrity()


def test_a_collision_costs_a_miss_and_never_gives_the_wrong_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "block_digest", lambda parent, tokens: b"same" if not parent else b"next")
    pool = BlockPool(8)
    cache = PrefixCache(pool, SIZE)
    a, b = list(range(8)), list(range(100, 108))
    of_a = published(pool, cache, a)
    assert cache.match([*a, 1])[0] == of_a
    assert cache.match([*b, 1])[0] == []
    # Same tokens in the second block, behind another first one: its KV is another's.
    mixed = [*b[:4], *a[4:]]
    assert cache.match([*mixed, 1])[0] == []
    of_b = published(pool, cache, b[:4])
    assert cache.match([*mixed, 1])[0] == of_b
    assert cache.match([*a, 1])[0] == []
    cache.check_integrity()


def test_clear_forgets_everything_but_takes_nothing_away() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, SIZE)
    held = published(pool, cache, list(range(8)))
    idle = published(pool, cache, list(range(50, 58)))
    pool.free(idle)
    cache.clear()
    assert len(cache) == 0
    assert cache.match(list(range(9)))[0] == []
    pool.check_integrity([held])
    cache.check_integrity()


def test_integrity_names_what_is_wrong() -> None:
    pool = BlockPool(4)
    cache = PrefixCache(pool, SIZE)
    [block] = published(pool, cache, list(range(4)))
    pool.forget(block)
    with pytest.raises(AssertionError, match=f"block {block} is indexed and not kept"):
        cache.check_integrity()


def test_blocks_are_shared_within_a_salt_alone() -> None:
    pool = BlockPool(32)
    cache = PrefixCache(pool, SIZE)
    tokens = list(range(12))
    held = {}
    for salt in ("", "a", "b", "a "):
        assert cache.match(tokens, salt)[0] == []
        held[salt] = pool.allocate(3)
        cache.publish(Chain.begin(salt), held[salt], tokens, 12)
    for salt, blocks in held.items():
        assert cache.match([*tokens, 1], salt)[0] == blocks
    assert cache.match([*tokens, 1], "c")[0] == []
    assert len(cache) == 12
    cache.check_integrity()


def test_publishing_goes_on_under_the_salt_of_the_match() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, SIZE)
    first = pool.allocate(2)
    cache.publish(Chain.begin("a"), first, list(range(8)), 8)
    found, chain = cache.match(list(range(13)), "a")
    assert found == first
    more = pool.allocate(1)
    cache.publish(chain, [*first, *more], list(range(12)), 12)
    assert cache.match(list(range(13)), "a")[0] == [*first, *more]
    assert cache.match(list(range(13)))[0] == []


def test_a_salt_is_compared_where_digests_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "salt_digest", lambda salt: b"")
    pool = BlockPool(8)
    cache = PrefixCache(pool, SIZE)
    tokens = list(range(8))
    cache.publish(Chain.begin("a"), pool.allocate(2), tokens, 8)
    assert cache.match([*tokens, 1], "b")[0] == []
    cache.check_integrity()
