"""The requests that wait for their first token, those whose prompt is being encoded included: how many, how large."""

from __future__ import annotations

import time
from collections.abc import Callable

from anabranch.errors import Overloaded
from orchestrator.fair_order import MAX_PRIORITY
from orchestrator.shares import SharedBound, Wanting

# Of a prompt's id: its int object and its entry of the request's tuple, and up to 16 bytes in the parsed message.
TOKEN_BYTES = 56


def weight_of_priority(priority: int) -> int:
    """A step of priority is worth twice the share of the room; an integer, so that sums of them are exact."""
    return 1 << (MAX_PRIORITY - priority)


class WaitingRoom:
    """Counts those that wait; full, it refuses, and a tenant or priority that has its share before the others.

    Args:
        max_places: most that wait.
        max_bytes: most bytes that they take together; one alone may take more, so that none is refused for ever.
        max_tokens: most prompt tokens, likewise.
        weight_of: a tenant's weight, by its name.
        clock: seconds.
    """

    def __init__(
        self,
        max_places: int,
        max_bytes: int,
        max_tokens: int,
        weight_of: Callable[[str], float] = lambda tenant: 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._places: SharedBound[str] = SharedBound(max_places)
        self._bytes: SharedBound[str] = SharedBound(max_bytes)
        self._tokens: SharedBound[str] = SharedBound(max_tokens)
        self._wanting = Wanting(weight_of)
        self._places_by_priority: SharedBound[int] = SharedBound(max_places)
        self._wanting_by_priority = Wanting(weight_of_priority)
        self._clock = clock

    @property
    def num_places(self) -> int:
        return self._places.num

    @property
    def num_bytes(self) -> int:
        return self._bytes.num

    @property
    def num_tokens(self) -> int:
        return self._tokens.num

    def enter(self, num_bytes: int, tenant: str = "", priority: int = 0) -> Place:
        """Take a place, with so many bytes to begin with. Raises Overloaded."""
        try:
            self._check_places(tenant, priority)
        except Overloaded:
            self._wanting_by_priority.refused(priority, self._clock())
            raise
        self.check_bytes(tenant, num_bytes, alone=self.num_places == 0)
        self._places.add(tenant, 1)
        self._places_by_priority.add(priority, 1)
        self._bytes.add(tenant, num_bytes)
        self._wanting.came(tenant)
        self._wanting_by_priority.came(priority)
        return Place(self, tenant, priority, num_bytes)

    def _check_places(self, tenant: str, priority: int) -> None:
        if self._places.is_full(1):
            self._refuse(tenant, f"{self.num_places} requests wait for their first token, as many as max_queued allows")
        self._check_share(self._places, tenant, 1, "requests", "max_queued")
        bound = self._places_by_priority
        if bound.is_beyond_share(priority, 1, lambda: self._wanting_by_priority.share_of(priority, self._clock())):
            self._refuse(
                tenant,
                f"{bound.of(priority)} requests of priority {priority} wait for their first token; 1 more is beyond "
                f"their share of the {bound.most} that max_queued allows, while others want room",
            )

    def hold(self, tenant: str, num_bytes: int, num_tokens: int) -> None:
        """Take room for the ids of a prompt that has a place. Raises Overloaded."""
        alone = self.num_places == 1
        self.check_bytes(tenant, num_bytes, alone=alone)
        if not alone:
            if self._tokens.is_full(num_tokens):
                self._refuse(
                    tenant,
                    f"the requests that wait for their first token have {self.num_tokens} prompt tokens and this one "
                    f"{num_tokens} more, above the {self._tokens.most} that max_queued_tokens allows",
                )
            self._check_share(self._tokens, tenant, num_tokens, "prompt tokens", "max_queued_tokens")
        self._bytes.add(tenant, num_bytes)
        self._tokens.add(tenant, num_tokens)

    def leave(self, tenant: str, priority: int, num_bytes: int, num_tokens: int) -> None:
        """Give a place up, with all that was taken for it."""
        self._places.add(tenant, -1)
        self._places_by_priority.add(priority, -1)
        self._bytes.add(tenant, -num_bytes)
        self._tokens.add(tenant, -num_tokens)
        self._wanting.left(tenant)
        self._wanting_by_priority.left(priority)

    def check_bytes(self, tenant: str, num_bytes: int, *, alone: bool) -> None:
        """Raise Overloaded where so many more bytes are too many."""
        if alone:
            return
        if self._bytes.is_full(num_bytes):
            self._refuse(
                tenant,
                f"the requests that wait for their first token take {self.num_bytes} bytes and this one {num_bytes} "
                f"more, above the {self._bytes.most} that max_queued_bytes allows",
            )
        self._check_share(self._bytes, tenant, num_bytes, "bytes", "max_queued_bytes")

    def _check_share(self, bound: SharedBound[str], tenant: str, num: int, what: str, key: str) -> None:
        if bound.is_beyond_share(tenant, num, lambda: self._wanting.share_of(tenant, self._clock())):
            self._refuse(
                tenant,
                f"the tenant {tenant!r} has {bound.of(tenant)} {what} waiting for their first token; {num} more are "
                f"beyond its share of the {bound.most} that {key} allows, while others want room",
            )

    def _refuse(self, tenant: str, reason: str) -> None:
        self._wanting.refused(tenant, self._clock())
        raise Overloaded(f"{reason}; try again later")


class Place:
    """One that waits, until `leave`."""

    def __init__(self, room: WaitingRoom, tenant: str, priority: int, num_bytes: int) -> None:
        self._room = room
        self._tenant = tenant
        self._priority = priority
        self._num_bytes = num_bytes
        self._num_tokens = 0
        self._left = False

    def hold_tokens(self, num_tokens: int) -> None:
        """Take room for the prompt's ids as well. Raises Overloaded."""
        assert not self._left
        num_bytes = TOKEN_BYTES * num_tokens
        self._room.hold(self._tenant, num_bytes, num_tokens)
        self._num_bytes += num_bytes
        self._num_tokens += num_tokens

    def leave(self) -> None:
        """Give the place up; a second call does nothing."""
        if not self._left:
            self._left = True
            self._room.leave(self._tenant, self._priority, self._num_bytes, self._num_tokens)
