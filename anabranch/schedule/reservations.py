"""Reservations of a decode worker: blocks first, then the KV cache that fills them.

    waiting (no blocks) -> leased (blocks held, stream open) -> committed (joins the batch)
                                                             -> aborted (blocks freed): cancelled, failed, expired

All methods run on the engine's thread; what the tensor plane reports is handed over to it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass

from anabranch.cache.kv_manager import KvCacheManager
from anabranch.cache.lease import Lease, LeaseBook
from anabranch.errors import StaleLease
from anabranch.schedule.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """A leased place for one request's KV cache."""

    sequence: Sequence
    lease: Lease


class Reservations:
    """The queue of those that wait for blocks and the book of open leases.

    Args:
        lease_s: seconds without a slice after which a lease expires.
    """

    def __init__(self, cache: KvCacheManager, leases: LeaseBook, lease_s: float) -> None:
        self.cache = cache
        self.leases = leases
        self.lease_s = lease_s
        self.waiting: deque[Sequence] = deque()
        self._open: dict[int, Reservation] = {}

    def __len__(self) -> int:
        return len(self.waiting) + len(self._open)

    def __contains__(self, key: tuple[str, int]) -> bool:
        return self.find(key) is not None or any(sequence.key == key for sequence in self.waiting)

    @property
    def num_leases(self) -> int:
        return len(self._open)

    def add(self, sequence: Sequence) -> None:
        """Queue for blocks; a resumed attempt goes before those that never ran."""
        if sequence.request.output_ids:
            self.waiting.appendleft(sequence)
        else:
            self.waiting.append(sequence)

    def admit(self, num_places: int) -> list[Reservation]:
        """Lease blocks to the head of the queue, and the next, for as long as they fit.

        Args:
            num_places: most leases that may be open, these included.
        """
        admitted = []
        while self.waiting and len(self._open) < num_places:
            sequence = self.waiting[0]
            salt = sequence.request.cache_salt
            if not self.cache.can_admit(sequence.tokens, sequence.num_tokens + 1, cache_salt=salt):
                break
            self.waiting.popleft()
            sequence.hold(self.cache.admit(sequence.key, sequence.tokens, sequence.num_tokens + 1, cache_salt=salt))
            assert sequence.table is not None
            lease = self.leases.open(sequence.key, sequence.table, self.lease_s)
            reservation = Reservation(sequence=sequence, lease=lease)
            self._open[lease.stream_id] = reservation
            admitted.append(reservation)
        return admitted

    def commit(self, stream_id: int) -> Sequence | None:
        """Close the lease because its KV is complete; None if it has already ended otherwise."""
        reservation = self._open.pop(stream_id, None)
        if reservation is None:
            return None
        self.leases.commit(stream_id)
        return reservation.sequence

    def abort(self, stream_id: int) -> Sequence | None:
        """Close the lease and free its blocks; None if it is not open."""
        reservation = self._open.pop(stream_id, None)
        if reservation is None:
            return None
        self.leases.abort(stream_id)
        table = reservation.sequence.let_go()
        if table is not None:
            self.cache.release(table)
        return reservation.sequence

    def get(self, stream_id: int) -> Reservation | None:
        """The open reservation of a stream."""
        return self._open.get(stream_id)

    def streams(self) -> tuple[int, ...]:
        """The streams that are open."""
        return tuple(self._open)

    def touch(self, stream_id: int) -> None:
        """Let the lease last on, because slices arrive; one that ran out stays for `expired`."""
        held = self._open.get(stream_id)
        if held is not None:
            with contextlib.suppress(StaleLease):
                self.leases.touch(stream_id, held.lease.generation)

    def find(self, key: tuple[str, int]) -> int | None:
        """The stream of an attempt whose lease is open."""
        lease = self.leases.find(key)
        return None if lease is None else lease.stream_id

    def forget_waiting(self, key: tuple[str, int]) -> Sequence | None:
        """Take an attempt out of the queue."""
        sequence = next((s for s in self.waiting if s.key == key), None)
        if sequence is not None:
            self.waiting.remove(sequence)
        return sequence
