"""The allocator of KV blocks: which are held, by how many, and which may be given out.

A block is in one of three states:

    blank (nothing worth keeping) --allocate--> held (1 or more references) --free--> blank
                                                   ^                          |
                                                 share                        v  if kept
                                                   +------------------- idle (kept, no references)
                                                                              |
                                              allocate, least recently used --+--> held

Blank blocks are given out first. An idle block's KV can be shared again until the block is given out anew.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence

from anabranch.errors import ConfigError, OutOfBlocks


class BlockPool:
    """Counts references to `num_blocks` blocks, ids 0 to `num_blocks - 1`.

    Attributes:
        on_reuse: called with a kept block's id just before the block is given out anew.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ConfigError("num_blocks", num_blocks, "must be at least 1")
        self.num_blocks = num_blocks
        self.on_reuse: Callable[[int], None] | None = None
        self._references = [0] * num_blocks
        self._kept = [False] * num_blocks
        self._blank: deque[int] = deque(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, idle ones included."""
        return len(self._blank) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Free blocks whose KV can still be shared."""
        return len(self._idle)

    def references(self, block_id: int) -> int:
        return self._references[block_id]

    def can_allocate(self, count: int) -> bool:
        return count <= self.num_free

    def allocate(self, count: int) -> list[int]:
        """Give out `count` blocks with one reference each.

        Raises:
            OutOfBlocks: fewer are free; then nothing was given out.
        """
        assert count >= 0
        if not self.can_allocate(count):
            raise OutOfBlocks(f"{count} KV blocks are wanted, {self.num_free} of {self.num_blocks} are free")
        return [self._take() for _ in range(count)]

    def share(self, block_ids: Sequence[int]) -> None:
        """Add a reference to each block; idle ones are held again."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                assert block_id in self._idle, f"block {block_id} is blank and cannot be shared"
                del self._idle[block_id]
            self._references[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Drop a reference to each block.

        The last of the given blocks are reused first: a prefix outlives what was built on it.
        """
        for block_id in reversed(block_ids):
            assert self._references[block_id] > 0, f"block {block_id} is freed twice"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                if self._kept[block_id]:
                    self._idle[block_id] = None
                else:
                    self._blank.append(block_id)

    def keep(self, block_id: int) -> None:
        """Let a held block's KV outlive its references, until the block is needed."""
        assert self._references[block_id] > 0, f"block {block_id} is not held"
        self._kept[block_id] = True

    def forget(self, block_id: int) -> None:
        """Undo `keep`."""
        self._kept[block_id] = False
        if block_id in self._idle:
            del self._idle[block_id]
            self._blank.append(block_id)

    def kept(self, block_id: int) -> bool:
        return self._kept[block_id]

    def check_integrity(self, holders: Iterable[Sequence[int]] | None = None) -> None:
        """Raise AssertionError, saying what is wrong, unless every block is in exactly one state.

        Args:
            holders: the block ids of everything that holds references; when given, the counts must agree.
        """
        faults: list[str] = []
        blank = set(self._blank)
        if len(blank) != len(self._blank):
            faults.append("a block is blank twice")
        for block_id, references in enumerate(self._references):
            states = [block_id in blank, block_id in self._idle, references > 0]
            if sum(states) != 1:
                faults.append(
                    f"block {block_id}: blank={states[0]}, idle={states[1]}, references={references}; not one state"
                )
            if self._kept[block_id] and block_id in blank:
                faults.append(f"block {block_id} is kept and blank")
            if block_id in self._idle and not self._kept[block_id]:
                faults.append(f"block {block_id} is idle and not kept")
        if holders is not None:
            counted = [0] * self.num_blocks
            for held in holders:
                for block_id in held:
                    counted[block_id] += 1
            faults.extend(
                f"block {block_id} has {references} references and {found} holders"
                for block_id, (references, found) in enumerate(zip(self._references, counted, strict=True))
                if references != found
            )
        if faults:
            more = f" (and {len(faults) - 10} more)" if len(faults) > 10 else ""
            raise AssertionError("block pool: " + "; ".join(faults[:10]) + more)

    def _take(self) -> int:
        if self._blank:
            block_id = self._blank.popleft()
        else:
            block_id, _ = self._idle.popitem(last=False)
            if self.on_reuse is not None:
                self.on_reuse(block_id)
            self._kept[block_id] = False
        self._references[block_id] = 1
        return block_id
