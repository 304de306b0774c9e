"""What a backend of the channel does: it moves messages between two processes, and knows their headers' frame alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from transport.m2n.header import Header

Opener = Callable[[bytes], Header]
"""Looks at a header's frame: see `header.open_header`."""
Packer = Callable[[int], bytes]
"""Makes a header from the body's checksum; 0: not computed."""


@dataclass(frozen=True, slots=True)
class Body:
    """Where a message's body lies.

    Attributes:
        offset: in `memory`, a multiple of ALIGNMENT.
    """

    memory: memoryview
    offset: int


@dataclass(frozen=True, slots=True)
class Message:
    """A message that has come whole.

    Attributes:
        slot: where it lies until the slot is given back.
    """

    slot: int
    header: Header
    body: Body


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
