"""Counts what ranks report about one thing, until all of them have."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Report = TypeVar("Report")


class Quorum(Generic[Report]):
    """Reports by key; one thread calls.

    Args:
        size: ranks that have to report.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._reports: dict[Hashable, dict[int, Report]] = {}

    def add(self, key: Hashable, rank: int, report: Report) -> list[Report] | None:
        """All ranks' reports, in rank order, with the last of them; None before that."""
        reports = self._reports.setdefault(key, {})
        reports[rank] = report
        if len(reports) < self.size:
            return None
        del self._reports[key]
        return [reports[rank] for rank in sorted(reports)]

    def forget(self, key: Hashable) -> None:
        """Drop what has been reported; what is not known is left alone."""
        self._reports.pop(key, None)
