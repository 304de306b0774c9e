"""What every group of ranks can do, whatever carries it.

All ranks of a group make the same collective calls in the same order. A group that failed stays failed: every
call on every rank raises what the first one did, until the ranks make a new group.
"""

from __future__ import annotations

from typing import Protocol

from anabranch.parallel.exchange import Exchange
from anabranch.parallel.group import Group

COLLECTIVE_TIMEOUT_S = 30.0


class CollectiveGroup(Group, Exchange, Protocol):
    """Ranks that compute one model together: sums, gathers and transfers.

    Every wait ends within `collective_timeout_s`. Raises, from every call that waits:
        PeerLost: a rank died or left, or the group was aborted; the message names the rank.
        DeadlineExceeded: a rank did not come; the message names it and the call.
        TransportError: ranks disagree on the call or its size.

    Attributes:
        name: for logs.
        backend: shm, gloo, nccl or threads.
        collective_timeout_s: longest wait in one call.
    """

    name: str
    backend: str
    collective_timeout_s: float

    def barrier(self) -> None:
        """Return when every rank has called it."""
        ...

    def split(self, color: int) -> CollectiveGroup:
        """The group of the ranks that give the same `color`, in rank order; every rank calls it."""
        ...

    def abort(self, reason: str) -> None:
        """End every wait of every rank of this group with PeerLost, now and in future; never blocks."""
        ...

    def close(self) -> None:
        """Leave the group and release what it holds; idempotent. Sub-groups are closed on their own."""
        ...
