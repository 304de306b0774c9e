"""A request's blocks, in the order of its tokens. Append-only: a block, once in a table, stays at its place."""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.cache.block_pool import BlockPool


class BlockTable:
    """The blocks that one request holds.

    Args:
        pool: where the blocks come from and go back to.
        block_size: tokens per block. Where a worker has several CP ranks, tokens of one block of each rank.
        key: `(request id, epoch)` of the holder.
        shared: blocks of a cached prefix, in order; a reference to each is taken. They are never written.
    """

    def __init__(
        self, pool: BlockPool, block_size: int, key: tuple[str, int] = ("", 0), shared: Sequence[int] = ()
    ) -> None:
        pool.share(shared)
        self.key = key
        self.block_size = block_size
        self.num_cached_tokens = len(shared) * block_size
        self._pool = pool
        self._ids = list(shared)
        self._frozen_ids: tuple[int, ...] | None = None
        self._released = False

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def block_ids(self) -> tuple[int, ...]:
        if self._frozen_ids is None:
            self._frozen_ids = tuple(self._ids)
        return self._frozen_ids

    @property
    def num_tokens(self) -> int:
        """Tokens that the blocks have room for."""
        return len(self._ids) * self.block_size

    @property
    def released(self) -> bool:
        return self._released

    def num_missing_blocks(self, num_tokens: int) -> int:
        """Blocks to be added before `num_tokens` tokens fit."""
        return max(0, -(-num_tokens // self.block_size) - len(self._ids))

    def grow_to(self, num_tokens: int) -> None:
        """Hold enough blocks for `num_tokens` tokens; never shrinks.

        Raises:
            OutOfBlocks: there are too few; then the table is as it was.
        """
        assert not self._released, f"the table of {self.key} has been released"
        missing = self.num_missing_blocks(num_tokens)
        if missing:
            self._ids.extend(self._pool.allocate(missing))
            self._frozen_ids = None

    def release(self) -> None:
        """Give all blocks back; a second call does nothing."""
        if not self._released:
            self._released = True
            self._pool.free(self._ids)
            self._ids = []
            self._frozen_ids = None
