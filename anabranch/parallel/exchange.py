"""Point-to-point inside a group: what ring attention moves its blocks with.

A rank posts a transfer, computes, then waits: the bytes move while it computes. Transfers between two ranks
arrive in the order in which both posted them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from anabranch.errors import TransportError


class Handle(Protocol):
    """A posted transfer."""

    def wait(self) -> None:
        """Return when the receive buffers are full and the sent tensors may be written again.

        Raises:
            PeerLost: the other rank died, or a rank aborted the group.
            DeadlineExceeded: the other rank did not take part within `collective_timeout_s`.
        """
        ...


class Exchange(Protocol):
    """Non-blocking transfers between ranks of a group.

    Attributes:
        rank: this rank, from 0.
        size: number of ranks.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def post(self, send: Sequence[torch.Tensor], to: int, receive: Sequence[torch.Tensor], source: int) -> Handle:
        """Start to send `send` to rank `to` and to fill `receive` from rank `source`; never blocks.

        Both ends name the same number of bytes; how these are cut into tensors may differ. Either sequence
        may be empty, and then its rank is not looked at. Until `wait` returns, `send` stays unchanged and
        `receive` (contiguous) is not read. Of posts to, or from, one rank the first is the first to end.

        Raises:
            ValueError: a rank outside the group, or a receive buffer that is not contiguous.
            PeerLost: the group was aborted.
        """
        ...

    def buffer_like(self, x: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor like `x` in the memory that this exchange fills fastest (any other works too)."""
        ...


def check_post(
    exchange: Exchange, send: Sequence[torch.Tensor], to: int, receive: Sequence[torch.Tensor], source: int
) -> None:
    """What every implementation asks of `post`'s arguments. Raises ValueError."""
    for name, tensors, peer in (("to", send, to), ("source", receive, source)):
        if tensors and not 0 <= peer < exchange.size:
            raise ValueError(f"{name}: {peer}: the group has ranks 0 to {exchange.size - 1}")
    for tensor in receive:
        if not tensor.is_contiguous():
            raise ValueError(f"receive: a buffer of shape {tuple(tensor.shape)} is not contiguous")


def check_sizes(sent_bytes: int, received_bytes: int, source: int, rank: int) -> None:
    """Raise TransportError where two ends of a transfer differ in size."""
    if sent_bytes != received_bytes:
        raise TransportError(f"rank {source} sends {sent_bytes} bytes where rank {rank} expects {received_bytes}")
