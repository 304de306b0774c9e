"""Sequences that were preempted with their KV kept in host memory, until they come back.

    running --offload--> offloaded (blocks free, host blocks held) --restore--> running, where it stopped
                                                             --forget------> gone: cancelled, failed

A host block's id means the same block on every rank, as a block's does in the pool. Ranks obey commands in the
order of sending. So as soon as a copy has been ordered, the blocks that it reads count as free: a step or a stream
that writes to them, or another copy, is ordered later. That holds too where a step that writes the last of the
sequence's KV has been ordered and is not yet over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from anabranch.cache.block_pool import BlockPool
from anabranch.cache.block_table import BlockTable
from anabranch.schedule.preemption import PreemptionRule
from anabranch.schedule.sequence import Sequence

OrderCopies = Callable[[tuple[tuple[int, int], ...]], None]


@dataclass(frozen=True, kw_only=True)
class _Offloaded:
    sequence: Sequence
    host_ids: tuple[int, ...]


class HostOffload:
    """The host blocks of a worker and the sequences that hold them.

    Args:
        num_blocks: host blocks of every rank.
        rule: whether it is worth it.
        copy_out: orders every rank to copy `(pool block, host block)` pairs, after all that was ordered before.
        copy_in: the same for `(host block, pool block)`.
    """

    def __init__(self, *, num_blocks: int, rule: PreemptionRule, copy_out: OrderCopies, copy_in: OrderCopies) -> None:
        self.pool = BlockPool(num_blocks)
        self.rule = rule
        self._copy_out = copy_out
        self._copy_in = copy_in
        self._offloaded: dict[tuple[str, int], _Offloaded] = {}

    def __len__(self) -> int:
        return len(self._offloaded)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.key in self._offloaded

    @property
    def sequences(self) -> list[Sequence]:
        return [offloaded.sequence for offloaded in self._offloaded.values()]

    @property
    def oldest(self) -> Sequence | None:
        """The one that came first to this worker; it comes back first."""
        return min(self.sequences, key=lambda s: s.age, default=None)

    def takes(self, sequence: Sequence) -> bool:
        """Whether there is room for a sequence's blocks, and copying them costs less than computing them again."""
        assert sequence.table is not None
        num_blocks = len(sequence.table)
        return self.pool.can_allocate(num_blocks) and self.rule.offloads(
            num_blocks=num_blocks, num_computed=sequence.num_computed
        )

    def offload(self, sequence: Sequence) -> BlockTable:
        """Copy out all blocks of a sequence, also those that an unfinished step writes; its table is given up."""
        table = sequence.offload()
        host_ids = tuple(self.pool.allocate(len(table)))
        self._offloaded[sequence.key] = _Offloaded(sequence=sequence, host_ids=host_ids)
        self._copy_out(tuple(zip(table.block_ids, host_ids, strict=True)))
        return table

    def restore(self, sequence: Sequence, table: BlockTable) -> None:
        """Let a sequence go on with a new table; blocks of it that the prefix cache gave are not copied."""
        host_ids = self._offloaded.pop(sequence.key).host_ids
        sequence.resume(table)
        begin = table.num_cached_tokens // table.block_size
        end = -(-sequence.num_computed // table.block_size)
        assert end <= min(len(host_ids), len(table))
        if begin < end:
            self._copy_in(tuple(zip(host_ids[begin:end], table.block_ids[begin:end], strict=True)))
        self.pool.free(host_ids)

    def forget(self, sequence: Sequence) -> None:
        """Free the host blocks of a sequence, if it is here."""
        offloaded = self._offloaded.pop(sequence.key, None)
        if offloaded is not None:
            self.pool.free(offloaded.host_ids)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every host block is free or held by one offloaded sequence."""
        self.pool.check_integrity([offloaded.host_ids for offloaded in self._offloaded.values()])
