"""Who hangs is named once, the one that others wait for first."""

from __future__ import annotations

import pytest

from anabranch.engine.activity import Activity
from runtime.watchdog import Watchdog
from tests.support.waiting import eventually

pytestmark = pytest.mark.unit


def test_each_is_named_once_in_their_order() -> None:
    compute, engine, idle = (Activity(name) for name in ("compute", "engine", "idle"))
    engine.begin()
    compute.begin()
    idle.begin()
    idle.end()
    seen: list[tuple[str, bool]] = []
    watchdog = Watchdog([compute, engine, idle], 0.1, lambda activity, age_s: seen.append((activity.what, age_s > 0.1)))
    watchdog.start()
    try:
        eventually(lambda: len(seen) == 2, "both")
        engine.end()
        engine.begin()
        idle.begin()
        eventually(lambda: len(seen) == 3, "the third")
    finally:
        watchdog.stop()
    assert seen == [("compute", True), ("engine", True), ("idle", True)]
    assert (engine.num_done, idle.num_done, compute.num_done) == (1, 1, 0)
    assert idle.age_s > 0.0
    idle.end()
    assert idle.age_s == 0.0
