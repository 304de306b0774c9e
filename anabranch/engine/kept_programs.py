"""The programs of recorded steps that are worth keeping, and what is known to be none."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A step's take some 50 KB; steps of more kinds than this take turns.
MAX_KEPT = 128


class KeptPrograms(Generic[T]):
    """What steps were recorded as, by their kind; the least recently used goes first."""

    def __init__(self) -> None:
        # None: known to be no program.
        self._kept: OrderedDict[Hashable, T | None] = OrderedDict()
        self._told: set[str] = set()

    def __contains__(self, kind: Hashable) -> bool:
        return kind in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def can_be(self, kind: Hashable) -> bool:
        """False where steps of a kind are known to be no program."""
        return kind not in self._kept or self._kept[kind] is not None

    def get(self, kind: Hashable) -> T | None:
        """What a kind was recorded as; None where it was not."""
        found = self._kept.get(kind)
        if found is not None:
            self._kept.move_to_end(kind)
        return found

    def keep(self, kind: Hashable, programs: T | None, what: str, obstacle: str | None) -> None:
        """Keep what a kind was recorded as.

        Args:
            programs: None: steps of this kind are never recorded.
            what: the steps in words, for the log.
            obstacle: why they are not; said once.
        """
        self._kept[kind] = programs
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        if obstacle is not None and obstacle not in self._told:
            self._told.add(obstacle)
            logger.info("%s are not recorded: %s", what, obstacle)
