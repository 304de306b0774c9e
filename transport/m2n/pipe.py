"""What a backend of the channel does: it moves messages between two processes, and knows their headers' frame alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import torch

from transport.m2n.header import DTYPES, Header

Opener = Callable[[bytes], Header]
"""Looks at a header's frame: see `header.open_header`."""
Packer = Callable[[int], bytes]
"""Makes a header from the body's checksum; 0: not computed."""

_Key = tuple[torch.dtype, int, int, int]
MAX_VIEWS = 256
"""Tensors over a region that are kept; making one costs as much as all else that a small message needs."""


class Region:
    """Memory that messages arrive in, as tensors of the dtypes that travel.

    Args:
        memory: a multiple of ALIGNMENT long.

    Attributes:
        words: the memory as uint32.
    """

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self.words = memory.cast("I")
        self._whole = {dtype: torch.frombuffer(memory, dtype=dtype) for dtype in (*DTYPES, torch.int32)}
        # Calls of a lane have mostly as many rows as the one before, and slots come round again.
        self._made: dict[_Key, torch.Tensor] = {}

    def matrix(self, dtype: torch.dtype, offset: int, num_rows: int, num_columns: int) -> torch.Tensor:
        """What lies at `offset` bytes, a multiple of ALIGNMENT; as a tensor that keeps the memory."""
        key = (dtype, offset, num_rows, num_columns)
        made = self._made.get(key)
        return self._make(key, (num_rows, num_columns), (num_columns, 1)) if made is None else made

    def column(self, dtype: torch.dtype, offset: int, length: int) -> torch.Tensor:
        """The same with one dimension."""
        key = (dtype, offset, length, 0)
        made = self._made.get(key)
        return self._make(key, (length,), (1,)) if made is None else made

    def _make(self, key: _Key, sizes: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        if len(self._made) >= MAX_VIEWS:
            self._made.clear()
        dtype, offset, _, _ = key
        made = self._made[key] = self._whole[dtype].as_strided(sizes, strides, offset // dtype.itemsize)
        return made


class Message(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A message that has come whole.

    Attributes:
        slot: where it lies until the slot is given back.
        region, offset: where its body begins.
        checksum: of the body as it came; None: not computed yet.
    """

    slot: int
    header: Header
    region: Region
    offset: int
    checksum: int | None = None


class Pipe(Protocol):
    """One end of a link, in one backend. Nothing here waits. It watches its socket with a `Waiter`."""

    def send(self, slot: int, pack: Packer, parts: Sequence[torch.Tensor]) -> None:
        """Copy a message out.

        Args:
            slot: one that the peer has done with: free at this end, or that of the call which this answers.
            parts: contiguous tensors on the CPU.

        Raises:
            PeerLost: the peer is gone.
        """
        ...

    def take(self) -> Message | None:
        """The next message; None where none has come whole.

        Raises:
            PeerLost: the peer is gone, and all that it sent has been taken.
            MalformedMessage, ChecksumMismatch: its frame is broken.
        """
        ...

    def give_back(self, slot: int) -> None:
        """The message in `slot` is not looked at any more."""
        ...

    def close(self) -> None:
        """What the peer writes from now on is seen by nobody. Idempotent."""
        ...
