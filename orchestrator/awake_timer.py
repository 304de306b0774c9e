"""A timer that does not run while the event loop is held up, or its process is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from anabranch.system.clock import loop_clock


class AwakeTimer:
    """`call_later` on `loop_clock()`; runs from its construction on.

    Args:
        limit_s: how long it runs.
        on_over: called then, unless it was cancelled.
    """

    def __init__(self, limit_s: float, on_over: Callable[[], None]) -> None:
        self._on_over = on_over
        self._loop = asyncio.get_running_loop()
        self._clock = loop_clock()
        self._deadline_s = self._clock.now() + limit_s
        self._look()

    def cancel(self) -> None:
        """Do not call; changes nothing once it has."""
        self._timer.cancel()

    def _look(self) -> None:
        self._timer = self._loop.call_later(max(0.0, self._deadline_s - self._clock.now()), self._expire)

    def _expire(self) -> None:
        if self._clock.now() < self._deadline_s:
            self._look()
        else:
            self._on_over()
