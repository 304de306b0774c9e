"""Who has said nothing for too long."""

from __future__ import annotations

import time
from collections.abc import Callable


class Silence:
    """When each rank was last heard; those that were never heard are not missed.

    Args:
        limit_s: longest silence.
        look_every_s: how often `look` is called where nobody speaks.
        clock: gives seconds.
    """

    def __init__(self, limit_s: float, *, look_every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._look_every_s = look_every_s
        self._clock = clock
        self._awake_s = clock()
        self._heard_s: dict[int, float] = {}

    def heard(self, rank: int) -> None:
        self._heard_s[rank] = self._awake_s = self._clock()

    def look(self) -> int | None:
        """A rank that has been silent for too long; to be asked when all that came has been heard."""
        now = self._clock()
        late_s = now - self._awake_s - self._look_every_s
        self._awake_s = now
        if late_s > self._look_every_s:
            # This process was held up, and what the others said meanwhile may not have come in yet.
            self._heard_s = {rank: heard_s + late_s for rank, heard_s in self._heard_s.items()}
        return next((rank for rank, heard_s in self._heard_s.items() if now - heard_s > self._limit_s), None)
