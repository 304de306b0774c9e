"""Pooled buffers between KV tensors and the wire.

Payloads leave from and arrive in these. They are plain CPU memory; for tensors on a GPU this is the place for
pinned memory, and the copies to and from `Staging.data` are the ones that become asynchronous.
"""

from __future__ import annotations

import threading

import torch

MIN_CAPACITY = 4096


class Staging:
    """One buffer.

    Attributes:
        data: uint8 `[capacity]`.
        view: the same bytes, for transports and checksums.
    """

    __slots__ = ("capacity", "data", "view")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data = torch.empty(capacity, dtype=torch.uint8)
        self.view = memoryview(self.data.numpy())  # type: ignore[arg-type]  # numpy arrays have the buffer protocol


class StagingPool:
    """Buffers by size, reused most recent first (it is still in the cache). Thread-safe.

    Args:
        max_bytes: most bytes handed out at a time; as much may be kept for reuse.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._idle_bytes = 0
        self._idle: dict[int, list[Staging]] = {}
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Staging | None:
        """A buffer of at least `num_bytes`, or None when `max_bytes` are handed out."""
        capacity = max(MIN_CAPACITY, 1 << (num_bytes - 1).bit_length())
        with self._lock:
            if self.used_bytes + capacity > self.max_bytes:
                return None
            self.used_bytes += capacity
            idle = self._idle.get(capacity)
            if idle:
                self._idle_bytes -= capacity
                return idle.pop()
        return Staging(capacity)

    def give(self, staging: Staging) -> None:
        """Return a buffer that nobody reads or writes any more."""
        with self._lock:
            self.used_bytes -= staging.capacity
            if self._idle_bytes + staging.capacity <= self.max_bytes:
                self._idle_bytes += staging.capacity
                self._idle.setdefault(staging.capacity, []).append(staging)
