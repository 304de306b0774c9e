"""Who has said nothing for too long."""

from __future__ import annotations

import time
from collections.abc import Callable

from anabranch.system.clock import AwakeClock


class Silence:
    """When each rank was last heard; those that were never heard are not missed. One thread calls.

    What the others said while that thread was held up may not have come in yet, so that time does not count.

    Args:
        limit_s: longest silence.
        look_every_s: how often `look` is called while no message comes.
        clock: gives seconds.
    """

    def __init__(self, limit_s: float, *, look_every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = AwakeClock(max_gap_s=2 * look_every_s, clock=clock)
        self._heard_s: dict[int, float] = {}

    def heard(self, rank: int) -> None:
        self._clock.tick()
        self._heard_s[rank] = self._clock.now()

    def look(self) -> int | None:
        """A rank that has been silent for too long; to be called once all that came has been taken in."""
        self._clock.tick()
        now_s = self._clock.now()
        return next((rank for rank, heard_s in self._heard_s.items() if now_s - heard_s > self._limit_s), None)
