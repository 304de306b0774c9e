from __future__ import annotations

import pytest

from anabranch.cache.block_pool import BlockPool
from anabranch.cache.block_table import BlockTable
from anabranch.errors import OutOfBlocks

pytestmark = pytest.mark.unit


def test_grows_by_whole_blocks_and_never_moves_one() -> None:
    pool = BlockPool(4)
    table = BlockTable(pool, 16)
    table.grow_to(1)
    assert (len(table), table.num_tokens) == (1, 16)
    first = table.block_ids
    table.grow_to(16)
    assert table.block_ids == first
    table.grow_to(33)
    assert table.num_tokens == 48
    assert table.block_ids[:1] == first
    table.grow_to(5)
    assert table.num_tokens == 48
    pool.check_integrity([table.block_ids])


def test_growing_too_far_changes_nothing() -> None:
    pool = BlockPool(2)
    table = BlockTable(pool, 4)
    table.grow_to(4)
    assert table.num_missing_blocks(13) == 3
    with pytest.raises(OutOfBlocks):
        table.grow_to(13)
    assert len(table) == 1
    assert pool.num_free == 1


def test_shares_a_prefix_and_gives_back_only_its_own_reference() -> None:
    pool = BlockPool(3)
    owner = BlockTable(pool, 4)
    owner.grow_to(8)
    sharer = BlockTable(pool, 4, ("r", 1), owner.block_ids)
    assert sharer.num_cached_tokens == 8
    sharer.grow_to(9)
    assert sharer.block_ids[:2] == owner.block_ids
    owner.release()
    assert pool.num_free == 0
    sharer.release()
    assert pool.num_free == 3


def test_release_is_idempotent_and_final() -> None:
    pool = BlockPool(2)
    table = BlockTable(pool, 4)
    table.grow_to(8)
    table.release()
    table.release()
    assert table.released
    assert table.block_ids == ()
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="released"):
        table.grow_to(1)
