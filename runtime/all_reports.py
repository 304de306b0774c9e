"""Counts what ranks report about one thing, until all of them have."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Report = TypeVar("Report")


class AllReports(Generic[Report]):
    """Reports by key and kind, for as long as they are expected; one thread calls.

    Args:
        size: ranks that have to report.
        kinds: classes of reports that each key expects of every rank, each counted by itself.
    """

    def __init__(self, size: int, *kinds: type[Report]) -> None:
        self._size = size
        self._kinds = kinds
        self._reports: dict[tuple[type[Report], Hashable], dict[int, Report]] = {}

    def __len__(self) -> int:
        """Kinds of keys whose reports are not complete."""
        return len(self._reports)

    def expect(self, key: Hashable) -> None:
        """Take reports on `key`; those on other keys are late, and dropped."""
        for kind in self._kinds:
            self._reports[kind, key] = {}

    def add(self, key: Hashable, rank: int, report: Report) -> list[Report] | None:
        """All ranks' reports of this kind, in rank order, with the last of them; None before that."""
        reports = self._reports.get((type(report), key))
        if reports is None:
            return None
        reports[rank] = report
        if len(reports) < self._size:
            return None
        del self._reports[type(report), key]
        return [reports[rank] for rank in sorted(reports)]

    def forget(self, key: Hashable) -> None:
        """Expect no more; what is not known is left alone."""
        for kind in self._kinds:
            self._reports.pop((kind, key), None)
