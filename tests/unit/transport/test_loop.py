"""The progress thread of a plane, by itself."""

from __future__ import annotations

import threading

from tests.support.waiting import eventually
from transport.planes.loop import ProgressLoop


def test_a_doze_ends_by_itself() -> None:
    """Also where its time is over before the thread has begun to wait, as happens on a busy machine."""
    for _ in range(200):
        ticks: list[None] = []

        def tick(ticks: list[None] = ticks) -> float:
            ticks.append(None)
            return 1e-9

        loop = ProgressLoop("dozing", tick)
        loop.start()
        try:
            eventually(lambda ticks=ticks: len(ticks) > 5)
        finally:
            loop.stop(lambda: None)


def test_a_call_ends_a_doze() -> None:
    called: list[bool] = []
    loop = ProgressLoop("dozing", lambda: 0.9e-3)
    loop.start()
    try:
        for num_calls in range(1, 200):
            loop.call_soon(lambda: called.append(threading.current_thread().name == "dozing"))
            eventually(lambda wanted=num_calls: len(called) == wanted)
    finally:
        loop.stop(lambda: None)
    assert all(called)
