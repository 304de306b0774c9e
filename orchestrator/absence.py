"""Nobody can serve: for a while that is a worker being started again, after that it is what requests are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Absence:
    """Tells a short absence of workers from a long one; belongs to one event loop.

    Args:
        grace_s: how long an absence is short.
        on_long: called when it has become long.
    """

    def __init__(self, grace_s: float, on_long: Callable[[], None]) -> None:
        self._grace_s = grace_s
        self._on_long = on_long
        self._timer: asyncio.TimerHandle | None = None
        self.long = False

    def begin(self) -> None:
        """Nobody can serve. A second call changes nothing."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._grace_s, self._become_long)

    def end(self) -> None:
        """Somebody can serve, or it matters no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.long = False

    def _become_long(self) -> None:
        self.long = True
        self._on_long()
