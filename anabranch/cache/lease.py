"""Leases of the decode side: blocks that wait for KV which another process computes.

    open -> touch, touch, ... (each slice that arrives) -> commit        (the table lives on in the batch)
                                                        -> abort         (the caller releases the table)
                                                        -> expired: no slice for `lease_s`; then abort

A slice names its stream and the lease's generation. Once a lease has closed or run out, its slices are refused,
so nothing is written to blocks that have gone to somebody else.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass

from anabranch.cache.block_table import BlockTable
from anabranch.errors import InvalidRequest, StaleLease
from anabranch.system.clock import awake_s


@dataclass(frozen=True, kw_only=True)
class Lease:
    """One reservation.

    Attributes:
        key: `(request id, epoch)`.
        stream_id: names the stream at this worker.
        generation: unlike that of any other lease, an earlier process's at the same address included.
        table: the blocks that are held.
        lease_s: seconds that the lease lasts after it was opened or touched.
    """

    key: tuple[str, int]
    stream_id: int
    generation: int
    table: BlockTable
    lease_s: float


class LeaseBook:
    """Open leases by stream. May be called from any thread: slices arrive on a plane's, the rest on the engine's.

    Args:
        clock: gives seconds; only differences matter.
    """

    def __init__(self, clock: Callable[[], float] = awake_s) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._leases: dict[int, Lease] = {}
        self._deadlines: dict[int, float] = {}
        self._streams: dict[tuple[str, int], int] = {}
        self._last_stream_id = 0
        # A random start keeps slices for an earlier process of the same address out.
        self._last_generation = secrets.randbits(40)

    def __len__(self) -> int:
        return len(self._leases)

    def open(self, key: tuple[str, int], table: BlockTable, lease_s: float) -> Lease:
        """Lease `table` to a stream.

        Raises:
            InvalidRequest: `key` has an open lease.
        """
        assert lease_s > 0.0
        with self._lock:
            if key in self._streams:
                raise InvalidRequest(f"{key[0]!r}, epoch {key[1]}, is reserved already", "request_id")
            self._last_stream_id += 1
            self._last_generation += 1
            lease = Lease(
                key=key,
                stream_id=self._last_stream_id,
                generation=self._last_generation,
                table=table,
                lease_s=lease_s,
            )
            self._leases[lease.stream_id] = lease
            self._streams[key] = lease.stream_id
            self._deadlines[lease.stream_id] = self._clock() + lease_s
            return lease

    def touch(self, stream_id: int, generation: int) -> Lease:
        """Check that a slice may be written, and let the lease last `lease_s` from now.

        Raises:
            StaleLease: the lease has closed or run out, or never was.
        """
        with self._lock:
            lease = self._leases.get(stream_id)
            if lease is None:
                raise StaleLease(f"stream {stream_id}: its lease has closed")
            if lease.generation != generation:
                raise StaleLease(f"stream {stream_id}: generation {generation} came, {lease.generation} is open")
            now = self._clock()
            if now >= self._deadlines[stream_id]:
                raise StaleLease(f"stream {stream_id}: its lease has run out, no slice came for {lease.lease_s} s")
            self._deadlines[stream_id] = now + lease.lease_s
            return lease

    def commit(self, stream_id: int) -> Lease:
        """Close the lease; its table stays held. One that ran out and was not aborted can still be committed.

        Raises:
            StaleLease: it has closed.
        """
        lease = self.abort(stream_id)
        if lease is None:
            raise StaleLease(f"stream {stream_id}: its lease has closed")
        return lease

    def abort(self, stream_id: int) -> Lease | None:
        """Close the lease; its table is the caller's to release. None if it has closed already."""
        with self._lock:
            lease = self._leases.pop(stream_id, None)
            if lease is not None:
                del self._deadlines[stream_id]
                del self._streams[lease.key]
            return lease

    def find(self, key: tuple[str, int]) -> Lease | None:
        """The open lease of `(request id, epoch)`."""
        with self._lock:
            stream_id = self._streams.get(key)
            return None if stream_id is None else self._leases[stream_id]

    def deadline(self, stream_id: int) -> float | None:
        """When the lease runs out, on the clock; None if it has closed."""
        with self._lock:
            return self._deadlines.get(stream_id)

    def expired(self, now: float | None = None) -> list[Lease]:
        """Leases that have run out and are still open, oldest deadline first; the caller aborts them."""
        with self._lock:
            at = self._clock() if now is None else now
            late = sorted((deadline, stream) for stream, deadline in self._deadlines.items() if deadline <= at)
            return [self._leases[stream] for _, stream in late]
