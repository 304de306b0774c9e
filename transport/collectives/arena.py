"""A rank's part of the segment as tensors: buffers that peers write to directly."""

from __future__ import annotations

import bisect
import ctypes
import weakref
from collections.abc import Callable

import torch

_ALIGNMENT = 4096  # whole pages: they are made present when a buffer is made, not when it is first written


class _Memory(ctypes.Array[ctypes.c_char]):
    """A stretch of the segment; the tensors over it keep it alive. The class exists for its weak references."""

    _type_ = ctypes.c_char
    _length_ = 1 << 40


class Arena:
    """Deals out a stretch of memory, first fit; a block comes back when the last tensor over it is gone.

    Args:
        address: where it starts.
        num_bytes: its length.
        populate: makes a stretch's pages present.
        on_empty: called once, after `close`, when no block is out.
    """

    def __init__(
        self, address: int, num_bytes: int, populate: Callable[[int, int], None], on_empty: Callable[[], None]
    ) -> None:
        self._address = address
        self._free = [(0, num_bytes // _ALIGNMENT * _ALIGNMENT)] if num_bytes >= _ALIGNMENT else []
        self._populate = populate
        self._on_empty: Callable[[], None] | None = on_empty
        self._num_out = 0
        self._closed = False

    def tensor_like(self, x: torch.Tensor) -> torch.Tensor | None:
        """An uninitialised contiguous tensor of x's shape and dtype, or None where it does not fit."""
        num_bytes = -(-x.nbytes // _ALIGNMENT) * _ALIGNMENT
        offset = self._take(num_bytes) if num_bytes and not self._closed else None
        if offset is None:
            return None
        self._num_out += 1
        self._populate(self._address + offset, num_bytes)
        memory = _Memory.from_address(self._address + offset)
        finalizer = weakref.finalize(memory, self._give, offset, num_bytes)
        finalizer.atexit = False
        return torch.frombuffer(memory, dtype=x.dtype, count=x.numel()).view(x.shape)

    def close(self) -> None:
        """Deal out no more; `on_empty` is called as soon as nothing is out. Idempotent."""
        self._closed = True
        self._finish()

    def _take(self, num_bytes: int) -> int | None:
        for index, (offset, length) in enumerate(self._free):
            if length >= num_bytes:
                self._free[index : index + 1] = [(offset + num_bytes, length - num_bytes)] if length > num_bytes else []
                return offset
        return None

    def _give(self, offset: int, num_bytes: int) -> None:
        index = bisect.bisect(self._free, (offset, 0))
        if index < len(self._free) and self._free[index][0] == offset + num_bytes:
            num_bytes += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == offset:
            offset, before = self._free.pop(index - 1)
            num_bytes += before
            index -= 1
        self._free.insert(index, (offset, num_bytes))
        self._num_out -= 1
        self._finish()

    def _finish(self) -> None:
        if self._closed and not self._num_out and self._on_empty is not None:
            on_empty, self._on_empty = self._on_empty, None
            on_empty()
