"""Counts what ranks report about one thing, until all of them have."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Report = TypeVar("Report")


class AllReports(Generic[Report]):
    """Reports by key, for as long as they are expected; one thread calls.

    Args:
        size: ranks that have to report.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._reports: dict[Hashable, dict[int, Report]] = {}

    def __len__(self) -> int:
        """Keys whose reports are not complete."""
        return len(self._reports)

    def expect(self, key: Hashable) -> None:
        """Take reports on `key`; those on other keys are late, and dropped."""
        self._reports[key] = {}

    def add(self, key: Hashable, rank: int, report: Report) -> list[Report] | None:
        """All ranks' reports, in rank order, with the last of them; None before that."""
        reports = self._reports.get(key)
        if reports is None:
            return None
        reports[rank] = report
        if len(reports) < self.size:
            return None
        del self._reports[key]
        return [reports[rank] for rank in sorted(reports)]

    def forget(self, key: Hashable) -> None:
        """Expect no more; what is not known is left alone."""
        self._reports.pop(key, None)
