"""Memory for what recorded steps compute on their way: lent out tensor by tensor, and never given back to others."""

from __future__ import annotations

import ctypes
import math
import weakref
from bisect import insort
from collections.abc import Sequence

import torch

CHUNK_BYTES = 1 << 20
# Tensors begin on a cache line of their own.
ALIGNMENT = 64


class Arena:
    """Hands out tensors whose memory comes back as soon as the last view of them is gone.

    The lowest address is taken first, so that the tensors of a step, as they come and go, meet in few cache lines.
    Programs hold addresses in here, so the arena lives as long as they do.
    """

    def __init__(self) -> None:
        self._chunks: list[torch.Tensor] = []
        # (address, bytes), ascending, no two adjacent.
        self._free: list[tuple[int, int]] = []

    @property
    def num_bytes(self) -> int:
        """Of memory taken from the system."""
        return sum(chunk.numel() for chunk in self._chunks)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous CPU tensor of at least one element."""
        num_bytes = math.prod(shape) * dtype.itemsize
        held_bytes = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        address = self._take(held_bytes)
        memory = (ctypes.c_char * num_bytes).from_address(address)
        # The tensor's storage holds `memory`, and all of its views hold the storage.
        weakref.finalize(memory, self._give, address, held_bytes).atexit = False
        return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in here."""
        return self._chunk_of(tensor) is not None

    def borrow(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same contiguous tensor, but its memory may be given to others once `tensor` itself is gone."""
        chunk = self._chunk_of(tensor)
        assert chunk is not None
        start = tensor.data_ptr() - chunk.data_ptr()
        return chunk[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def _chunk_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        address = tensor.data_ptr()
        return next((c for c in self._chunks if c.data_ptr() <= address < c.data_ptr() + c.numel()), None)

    def _take(self, num_bytes: int) -> int:
        for place, (address, free_bytes) in enumerate(self._free):
            if free_bytes >= num_bytes:
                rest = [(address + num_bytes, free_bytes - num_bytes)] if free_bytes > num_bytes else []
                self._free[place : place + 1] = rest
                return address
        chunk = torch.empty(max(CHUNK_BYTES, num_bytes) + ALIGNMENT, dtype=torch.uint8)
        self._chunks.append(chunk)
        start = -(-chunk.data_ptr() // ALIGNMENT) * ALIGNMENT
        self._give(start, max(CHUNK_BYTES, num_bytes))
        return self._take(num_bytes)

    def _give(self, address: int, num_bytes: int) -> None:
        insort(self._free, (address, num_bytes))
        joined: list[tuple[int, int]] = []
        for start, free_bytes in self._free:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + free_bytes)
            else:
                joined.append((start, free_bytes))
        self._free = joined
