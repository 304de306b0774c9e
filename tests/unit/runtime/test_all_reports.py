from __future__ import annotations

import pytest

from runtime.all_reports import AllReports

pytestmark = pytest.mark.unit


def test_the_last_report_brings_all_in_rank_order() -> None:
    quorum = AllReports[str](3)
    quorum.expect("a")
    assert quorum.add("a", 2, "two") is None
    assert quorum.add("a", 0, "zero") is None
    assert quorum.add("a", 2, "again") is None
    assert quorum.add("a", 1, "one") == ["zero", "one", "again"]
    assert len(quorum) == 0


def test_late_reports_leave_nothing_behind() -> None:
    quorum = AllReports[int](2)
    assert quorum.add("never", 0, 1) is None
    quorum.expect("given up")
    quorum.add("given up", 0, 1)
    quorum.forget("given up")
    quorum.forget("given up")
    assert quorum.add("given up", 1, 1) is None
    assert len(quorum) == 0


def test_one_rank_is_a_quorum() -> None:
    quorum = AllReports[int](1)
    quorum.expect(5)
    assert quorum.add(5, 0, 7) == [7]
