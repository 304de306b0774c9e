"""What schedulers ask for KV memory: admit, grow, publish, release.

    can_admit -> admit (longest cached prefix shared, the rest allocated) -> grow ... -> release
                         publish, as blocks become full and their KV is computed

No torch, no locks: one thread calls. With CP ranks, a block here is one block of every rank
(`block_size * cp` tokens), and its id is the same on each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.cache.block_pool import BlockPool
from anabranch.cache.block_table import BlockTable
from anabranch.cache.prefix_cache import Chain, PrefixCache


@dataclass(frozen=True, kw_only=True)
class KvStats:
    """A snapshot of the pool.

    Attributes:
        num_free_blocks: blank and idle.
        num_idle_blocks: free, and still findable by prefix.
        num_tables: requests that hold blocks.
        num_queried_tokens: tokens of all admitted prompts since the start.
        num_hit_tokens: of these, the ones that the prefix cache gave.
    """

    num_total_blocks: int
    num_free_blocks: int
    num_idle_blocks: int
    num_tables: int
    num_queried_tokens: int
    num_hit_tokens: int


class KvCacheManager:
    """Composes pool, tables and prefix cache.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens per block in the scheduler's view.
        prefix_cache: whether finished requests' full blocks serve prompts that begin alike.
    """

    def __init__(self, *, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.prefix = PrefixCache(self.pool, block_size) if prefix_cache else None
        self._tables: dict[int, tuple[BlockTable, Chain]] = {}
        self._num_queried_tokens = 0
        self._num_hit_tokens = 0

    def fits(self, num_tokens: int) -> bool:
        """Whether the pool, were it empty, could hold so many tokens of one request."""
        return num_tokens <= self.pool.num_blocks * self.block_size

    def can_admit(
        self, token_ids: Sequence[int], num_tokens: int, spare_blocks: int = 0, *, cache_salt: str = ""
    ) -> bool:
        """Whether `admit` with the same arguments would succeed and leave `spare_blocks` free."""
        wanted = self._num_blocks(num_tokens) + spare_blocks
        if wanted <= self.pool.num_free:
            return True
        if self.prefix is None or wanted > self.pool.num_blocks:
            return False
        shared, _ = self.prefix.match(token_ids, cache_salt)
        return self._num_to_allocate(num_tokens, shared) + spare_blocks <= self._num_free_beside(shared)

    def admit(
        self, key: tuple[str, int], token_ids: Sequence[int], num_tokens: int, *, cache_salt: str = ""
    ) -> BlockTable:
        """Give a request blocks for at least `num_tokens` tokens.

        Args:
            key: `(request id, epoch)`.
            token_ids: all known tokens; the longest cached prefix of them is shared.
            cache_salt: of the request; it shares with requests of the same salt alone.

        Returns:
            A table whose `num_cached_tokens` leading tokens have their KV already; always fewer than
            `len(token_ids)`. The blocks of these are shared and must not be written.

        Raises:
            OutOfBlocks: nothing was taken.
        """
        shared, chain = self.prefix.match(token_ids, cache_salt) if self.prefix is not None else ([], Chain())
        table = BlockTable(self.pool, self.block_size, key, shared)
        try:
            table.grow_to(num_tokens)
        except BaseException:
            table.release()
            raise
        self._tables[id(table)] = (table, chain)
        self._num_queried_tokens += len(token_ids)
        self._num_hit_tokens += table.num_cached_tokens
        return table

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens; False, and nothing changed, if blocks have run out."""
        if not self.pool.can_allocate(table.num_missing_blocks(num_tokens)):
            return False
        table.grow_to(num_tokens)
        return True

    def publish(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Let others share the full blocks among the first `num_computed` tokens, whose KV is in the cache."""
        if self.prefix is None:
            return
        _, chain = self._tables[id(table)]
        if num_computed // self.block_size > chain.num_blocks:
            self.prefix.publish(chain, table.block_ids, token_ids, num_computed)

    def release(self, table: BlockTable) -> None:
        """Take a request's blocks back; a second call does nothing."""
        self._tables.pop(id(table), None)
        table.release()

    def stats(self) -> KvStats:
        return KvStats(
            num_total_blocks=self.pool.num_blocks,
            num_free_blocks=self.pool.num_free,
            num_idle_blocks=self.pool.num_idle,
            num_tables=len(self._tables),
            num_queried_tokens=self._num_queried_tokens,
            num_hit_tokens=self._num_hit_tokens,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless every reference belongs to a table that has not been released."""
        self.pool.check_integrity([table.block_ids for table, _ in self._tables.values()])
        if self.prefix is not None:
            self.prefix.check_integrity()

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _num_to_allocate(self, num_tokens: int, shared: Sequence[int]) -> int:
        return max(0, self._num_blocks(num_tokens) - len(shared))

    def _num_free_beside(self, shared: Sequence[int]) -> int:
        """Blocks that are free once `shared` are held."""
        return self.pool.num_free - sum(self.pool.references(block_id) == 0 for block_id in shared)
