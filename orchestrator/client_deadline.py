"""Until when a client waits for its answer; work that is not begun by then is not begun."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from anabranch.errors import AnabranchError, DeadlineExceeded


class ClientDeadline:
    """A client's time goes on while this process is held up, so it is the wall clock's and not the event loop's.

    Args:
        given_s: how long the client waits from now on; None: as long as it takes.
    """

    def __init__(self, given_s: float | None) -> None:
        self._given_s = math.inf if given_s is None else given_s
        self._at_s = time.monotonic() + self._given_s
        self._timer: asyncio.TimerHandle | None = None

    @property
    def remaining_s(self) -> float:
        """Seconds left, infinite where there is no deadline; not above 0 once it is over."""
        return self._at_s - time.monotonic()

    def check(self) -> None:
        """Raise DeadlineExceeded once it is over."""
        if self.remaining_s <= 0.0:
            raise self.error()

    def extend(self, other: ClientDeadline) -> None:
        """Somebody else waits for the same answer, and maybe longer."""
        if other._at_s > self._at_s:
            self._at_s, self._given_s = other._at_s, other._given_s

    def watch(self, on_over: Callable[[AnabranchError], None]) -> None:
        """Call `on_over` with the error once it is over, unless `cancel` comes first. For code on an event loop."""
        if self._at_s < math.inf:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, self.remaining_s), self._expire, on_over)

    def cancel(self) -> None:
        """Watch no more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self, on_over: Callable[[AnabranchError], None]) -> None:
        if self.remaining_s > 0.0:
            self.watch(on_over)
        else:
            on_over(self.error())

    def error(self) -> DeadlineExceeded:
        """What a request is told that was not done in time."""
        return DeadlineExceeded(f"deadline: the {self._given_s:.3g} s that the client gave are over")
