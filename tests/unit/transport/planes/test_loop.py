"""The progress thread of a plane, by itself."""

from __future__ import annotations

import logging
import os
import selectors
import threading

import pytest

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


@pytest.mark.parametrize("reused", [False, True])
def test_what_one_callback_ends_is_not_called_in_the_same_turn(caplog: pytest.LogCaptureFixture, reused: bool) -> None:
    """Both descriptors are ready; whoever is called first ends the other, whose number may be another's then."""
    called: list[str] = []
    pipes = {name: os.pipe() for name in ("first", "second")}
    extra = os.pipe()
    loop = ProgressLoop("ending", lambda: 3600.0)

    def end_other(name: str) -> None:
        called.append(name)
        os.read(pipes[name][0], 1)
        other = pipes["second" if name == "first" else "first"][0]
        loop.unwatch(other)
        if reused:
            os.dup2(extra[0], other)
            loop.watch(other, selectors.EVENT_READ, lambda: called.append("wrong"))

    for name, (reader, writer) in pipes.items():
        os.write(writer, b"x")
        loop.watch(reader, selectors.EVENT_READ, lambda name=name: end_other(name))
    loop.start()
    try:
        eventually(lambda: called)
        turns: list[None] = []
        loop.call_soon(lambda: turns.append(None))
        eventually(lambda: turns)
        assert len(called) == 1
        assert "wrong" not in called
    finally:
        loop.stop(lambda: None)
        for fd in (*pipes["first"], *pipes["second"], *extra):
            os.close(fd)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
