"""How fast the queue empties, and so how long a wait will be."""

from __future__ import annotations

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
        # From this busy time on, all that was given is in the buckets: (busy time at their start, tokens).
        self._from_s = 0.0
        self._buckets: deque[tuple[float, int]] = deque()

    def waiting(self, anybody: bool, now_s: float) -> None:
        """Whether anybody waits from now on; may be said again and again."""
        if anybody and self._since is None:
            if now_s - self._last_busy_at > STALE_S:
                self._from_s = self._busy_s
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
        start_s = self._busy_at(now_s) // self._bucket_s * self._bucket_s
        if self._buckets and self._buckets[-1][0] == start_s:
            num_tokens += self._buckets.pop()[1]
        self._buckets.append((start_s, num_tokens))

    def tokens_per_s(self, now_s: float) -> float | None:
        """The rate over the latest window with a queue; None while nothing was given, or it was long ago."""
        if self._since is None and now_s - self._last_busy_at > STALE_S:
            return None
        busy_s = self._busy_at(now_s)
        self._from_s = max(self._from_s, (busy_s - self._window_s) // self._bucket_s * self._bucket_s)
        while self._buckets and self._buckets[0][0] < self._from_s:
            self._buckets.popleft()
        span_s = busy_s - self._from_s
        num_tokens = sum(tokens for _, tokens in self._buckets)
        return num_tokens / span_s if num_tokens and span_s >= MIN_BUSY_S else None

    def _busy_at(self, now_s: float) -> float:
        return self._busy_s + (0.0 if self._since is None else max(0.0, now_s - self._since))
