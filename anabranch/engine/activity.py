"""What a thread is at, and since when: how others notice that it hangs."""

from __future__ import annotations

from anabranch.system.clock import awake_s


class Activity:
    """One thread's pieces of work. That thread begins and ends them, any thread reads.

    Args:
        what: the thread, in words.

    Attributes:
        num_done: pieces that have ended.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.num_done = 0
        self._began_s: float | None = None

    def begin(self) -> None:
        self._began_s = awake_s()

    def end(self) -> None:
        self._began_s = None
        self.num_done += 1

    @property
    def age_s(self) -> float:
        """Seconds since the piece in hand began; 0 where there is none."""
        began_s = self._began_s
        return 0.0 if began_s is None else awake_s() - began_s
