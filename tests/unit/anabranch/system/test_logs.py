import logging

from anabranch.system.logs import LimitedLog


def test_the_first_lines_are_written_and_the_rest_counted(caplog):
    log = LimitedLog(logging.getLogger("limited"), max_lines=3, interval_s=3600.0)
    for number in range(1000):
        log.warning(f"line {number}")
    assert [record.message for record in caplog.records] == [
        "line 0",
        "line 1",
        "line 2 (no more such lines for up to 3600 s)",
    ]
    log._begins_s -= 3600.0
    log.warning("again")
    assert caplog.records[-1].message == "again (and 997 such lines that were not written)"
    assert log.num_warnings == 1001
    log.warning("more")
    assert caplog.records[-1].message == "more"
