from __future__ import annotations

import pytest

from runtime.all_reports import AllReports

pytestmark = pytest.mark.unit


def test_the_last_report_brings_all_in_rank_order() -> None:
    quorum = AllReports[str](3, str)
    quorum.expect("a")
    assert quorum.add("a", 2, "two") is None
    assert quorum.add("a", 0, "zero") is None
    assert quorum.add("a", 2, "again") is None
    assert quorum.add("a", 1, "one") == ["zero", "one", "again"]
    assert len(quorum) == 0


def test_late_reports_leave_nothing_behind() -> None:
    quorum = AllReports[int](2, int)
    assert quorum.add("never", 0, 1) is None
    quorum.expect("given up")
    quorum.add("given up", 0, 1)
    quorum.forget("given up")
    quorum.forget("given up")
    assert quorum.add("given up", 1, 1) is None
    assert len(quorum) == 0


def test_one_rank_is_a_quorum() -> None:
    quorum = AllReports[int](1, int)
    quorum.expect(5)
    assert quorum.add(5, 0, 7) == [7]


def test_each_kind_is_counted_by_itself() -> None:
    reports = AllReports[int | str](2, int, str)
    reports.expect("a")
    assert reports.add("a", 0, 1) is None
    assert reports.add("a", 1, "one") is None
    assert reports.add("a", 1, 2) == [1, 2]
    assert reports.add("a", 0, "zero") == ["zero", "one"]
    reports.expect("b")
    reports.forget("b")
    assert len(reports) == 0
