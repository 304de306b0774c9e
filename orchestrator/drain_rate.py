"""How fast the queue empties, and so how long a wait will be."""

from __future__ import annotations

import math
from collections import deque

WINDOW_S = 10.0
# Below that much of waiting, too little was seen to judge by.
MIN_BUSY_S = 0.5
# What was measured so long ago was measured of another cluster.
STALE_S = 120.0
_NUM_BUCKETS = 40


class DrainRate:
    """Prompt tokens per second that workers are given while requests wait.

    Times in which nobody waits do not count: then clients set the pace, and not the cluster. Times are of any one
    clock, in seconds.

    Args:
        window_s: time with a queue that is looked back on.
    """

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._bucket_s = window_s / _NUM_BUCKETS
        # Time with a queue, up to `_since` where there is one now.
        self._busy_s = 0.0
        self._since: float | None = None
        self._last_busy_at = 0.0
        # Pieces of busy time by number, with the tokens given in each; from `_first` on, all that were given.
        self._first = 0
        self._buckets: deque[tuple[int, int]] = deque()

    def waiting(self, anybody: bool, now_s: float) -> None:
        """Whether anybody waits from now on; may be said again and again."""
        if anybody and self._since is None:
            if now_s - self._last_busy_at > STALE_S:
                self._first = self._bucket_at(self._busy_s) + 1
                self._busy_s = self._first * self._bucket_s
                self._buckets.clear()
            self._since = now_s
        elif not anybody and self._since is not None:
            self._busy_s = self._busy_at(now_s)
            self._last_busy_at = now_s
            self._since = None

    def given(self, num_tokens: int, now_s: float) -> None:
        """Workers were given a prompt; one that did not wait does not count."""
        if self._since is None:
            return
        self._forget(now_s)
        number = self._bucket_at(self._busy_at(now_s))
        if self._buckets and self._buckets[-1][0] == number:
            num_tokens += self._buckets.pop()[1]
        self._buckets.append((number, num_tokens))

    def tokens_per_s(self, now_s: float) -> float | None:
        """The rate over the latest window with a queue; None while nothing was given, or it was long ago."""
        if self._since is None and now_s - self._last_busy_at > STALE_S:
            return None
        self._forget(now_s)
        span_s = self._busy_at(now_s) - self._first * self._bucket_s
        num_tokens = sum(tokens for _, tokens in self._buckets)
        return num_tokens / span_s if num_tokens and span_s >= MIN_BUSY_S else None

    def _forget(self, now_s: float) -> None:
        """Look back no further than the window."""
        self._first = max(self._first, self._bucket_at(self._busy_at(now_s) - self._window_s))
        while self._buckets and self._buckets[0][0] < self._first:
            self._buckets.popleft()

    def _bucket_at(self, busy_s: float) -> int:
        return math.floor(busy_s / self._bucket_s + 1e-9)

    def _busy_at(self, now_s: float) -> float:
        return self._busy_s + (0.0 if self._since is None else max(0.0, now_s - self._since))
