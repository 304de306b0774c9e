from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from anabranch.cache.block_pool import BlockPool
from anabranch.errors import ConfigError, OutOfBlocks

pytestmark = pytest.mark.unit


def test_allocates_each_block_once_and_refuses_what_is_not_there() -> None:
    pool = BlockPool(4)
    first = pool.allocate(3)
    assert len(set(first)) == 3
    assert pool.num_free == 1
    assert pool.can_allocate(1)
    assert not pool.can_allocate(2)
    with pytest.raises(OutOfBlocks, match="2 KV blocks are wanted, 1 of 4 are free"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.free(first)
    assert pool.num_free == 4
    pool.check_integrity([])


def test_a_pool_needs_a_block() -> None:
    with pytest.raises(ConfigError, match="num_blocks: 0"):
        BlockPool(0)


def test_shared_blocks_stay_until_the_last_holder_frees_them() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.share(blocks)
    pool.free(blocks)
    assert pool.num_free == 0
    pool.check_integrity([blocks])
    pool.free(blocks)
    assert pool.num_free == 2


def test_freeing_twice_is_a_bug() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


def test_blank_blocks_cannot_be_shared() -> None:
    pool = BlockPool(1)
    with pytest.raises(AssertionError, match="blank"):
        pool.share([0])


def test_kept_blocks_are_reused_last_and_least_recently_used_first() -> None:
    pool = BlockPool(4)
    reused: list[int] = []
    pool.on_reuse = reused.append
    a, b, c, d = pool.allocate(4)
    for block in (a, b, c):
        pool.keep(block)
    pool.free([a])
    pool.free([b, c])  # c goes before b: it was built on b
    pool.free([d])
    assert (pool.num_free, pool.num_idle) == (4, 3)
    pool.share([a])
    pool.free([a])  # a was used just now
    assert pool.allocate(1) == [d]
    assert reused == []
    assert pool.allocate(3) == [c, b, a]
    assert reused == [c, b, a]
    assert not pool.kept(a)


def test_forgotten_idle_blocks_are_blank_again() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.keep(blocks[0])
    pool.free(blocks)
    pool.forget(blocks[0])
    assert pool.num_idle == 0
    assert pool.num_free == 2
    pool.check_integrity([])


def test_integrity_names_what_is_wrong() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match=f"block {blocks[0]} has 1 references and 0 holders"):
        pool.check_integrity([])
    pool._references[blocks[0]] = 0
    with pytest.raises(AssertionError, match=f"block {blocks[0]}: .* not one state"):
        pool.check_integrity()


class PoolMachine(RuleBasedStateMachine):
    """Any order of operations keeps every block in one state, and the counts equal to the holders'."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(7)
        self.holders: list[list[int]] = []

    @rule(count=st.integers(0, 8))
    def allocate(self, count: int) -> None:
        if self.pool.can_allocate(count):
            self.holders.append(self.pool.allocate(count))
        else:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)

    @rule(which=st.integers(0, 100))
    def share(self, which: int) -> None:
        if self.holders:
            blocks = list(self.holders[which % len(self.holders)])
            self.pool.share(blocks)
            self.holders.append(blocks)

    @rule(which=st.integers(0, 100))
    def keep(self, which: int) -> None:
        if self.holders:
            for block in self.holders[which % len(self.holders)]:
                self.pool.keep(block)

    @rule(block=st.integers(0, 6))
    def forget(self, block: int) -> None:
        self.pool.forget(block)

    @rule(which=st.integers(0, 100))
    def free(self, which: int) -> None:
        if self.holders:
            self.pool.free(self.holders.pop(which % len(self.holders)))

    @invariant()
    def consistent(self) -> None:
        self.pool.check_integrity(self.holders)
        held = {block for holder in self.holders for block in holder}
        assert self.pool.num_free == 7 - len(held)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
