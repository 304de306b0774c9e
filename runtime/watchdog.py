"""A thread that looks whether others hang: one that computes, schedules or runs the event loop may never come back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from anabranch.engine.activity import Activity

LOOK_EVERY_S = 0.25


class Watchdog:
    """Says once of each activity that a piece of work has lasted too long. Where several have, in their order.

    Args:
        activities: what is watched; those that wait for others come after them.
        limit_s: longest piece of work.
        stalled: called with an activity and its age in seconds, on the watchdog's thread.
    """

    def __init__(
        self, activities: Sequence[Activity], limit_s: float, stalled: Callable[[Activity, float], None]
    ) -> None:
        self._activities = list(activities)
        self._limit_s = limit_s
        self._stalled = stalled
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Idempotent."""
        self._ended.set()
        self._thread.join(LOOK_EVERY_S)

    def _run(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            for activity in tuple(self._activities):
                age_s = activity.age_s
                if age_s > self._limit_s:
                    self._activities.remove(activity)
                    self._stalled(activity, age_s)
