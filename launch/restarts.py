"""When a process that died is started again: a pure object that is told the time."""

from __future__ import annotations

from collections import deque

FIRST_WAIT_S = 0.5
MAX_WAIT_S = 30.0
# One that ran so long is as good as new: its next death is the first of a row.
STEADY_S = 60.0
WINDOW_S = 600.0


class Restarts:
    """Those of one process: waits that double from FIRST_WAIT_S to MAX_WAIT_S, and so many starts in WINDOW_S.

    Args:
        max_in_window: starts after which the process stays away.
    """

    def __init__(self, max_in_window: int) -> None:
        self._max_in_window = max_in_window
        self._starts_s: deque[float] = deque()
        self._num_in_row = 0

    def died(self, now_s: float) -> float | None:
        """Seconds until it is started again; None: it is not."""
        while self._starts_s and self._starts_s[0] <= now_s - WINDOW_S:
            self._starts_s.popleft()
        if len(self._starts_s) >= self._max_in_window:
            return None
        if not self._starts_s or now_s - self._starts_s[-1] >= STEADY_S:
            self._num_in_row = 0
        wait_s = min(MAX_WAIT_S, FIRST_WAIT_S * 2.0**self._num_in_row)
        self._num_in_row += 1
        self._starts_s.append(now_s + wait_s)
        return wait_s
