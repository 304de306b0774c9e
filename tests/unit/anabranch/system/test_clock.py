"""Time for judging others stands still while the judge is held up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest
import uvloop

from anabranch.system.clock import MAX_GAP_S, AwakeClock, awake_s, loop_clock, result_of, timeout, timeout_at, wait_for
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.unit


class Hands:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_that_is_ticked_counts_in_full() -> None:
    hands = Hands()
    clock = AwakeClock(max_gap_s=1.0, clock=hands)
    begun = clock.now()
    for _ in range(100):
        hands.now += 0.9
        clock.tick()
    hands.now += 0.5
    assert clock.now() - begun == pytest.approx(90.5)


@pytest.mark.parametrize("who_looks_first", ["a reader", "the ticker"])
def test_a_stop_counts_for_no_more_than_the_gap(who_looks_first: str) -> None:
    hands = Hands()
    clock = AwakeClock(max_gap_s=1.0, clock=hands)
    begun = clock.now()
    hands.now += 3600.0
    if who_looks_first == "a reader":
        assert clock.now() - begun == pytest.approx(1.0)
    clock.tick()
    assert clock.now() - begun == pytest.approx(1.0)
    hands.now += 0.25
    assert clock.now() - begun == pytest.approx(1.25)


def test_it_never_goes_back() -> None:
    hands = Hands()
    clock = AwakeClock(max_gap_s=1.0, clock=hands)
    seen = [clock.now()]
    for step_s in (0.5, 2.0, 0.0, 0.1, 5.0, 0.9):
        hands.now += step_s
        seen.append(clock.now())
        clock.tick()
        seen.append(clock.now())
    assert seen == sorted(seen)


def test_a_loop_that_is_held_up_does_not_count_it() -> None:
    async def scenario() -> None:
        came: asyncio.Queue[int] = asyncio.Queue()
        clock = loop_clock()
        assert loop_clock() is clock
        begun = clock.now()
        # Whatever comes by itself next comes only after the loop was held up for longer than may be waited.
        asyncio.get_running_loop().call_later(0.0, time.sleep, 4 * MAX_GAP_S)
        asyncio.get_running_loop().call_later(4 * MAX_GAP_S, came.put_nowait, 7)
        async with timeout(3 * MAX_GAP_S):
            assert await came.get() == 7
        assert clock.now() - begun < 3 * MAX_GAP_S

    uvloop.run(scenario())


def test_a_timeout_ends_what_takes_longer_on_the_loops_clock() -> None:
    async def scenario() -> None:
        begun = loop_clock().now()
        with pytest.raises(TimeoutError):
            async with timeout(0.05):
                await asyncio.Event().wait()
        assert loop_clock().now() - begun >= 0.05
        with pytest.raises(TimeoutError):
            async with timeout_at(loop_clock().now() - 1.0):
                await asyncio.Event().wait()
        # What is there already is taken, however late it is.
        full: asyncio.Queue[int] = asyncio.Queue()
        full.put_nowait(1)
        async with timeout_at(loop_clock().now() - 1.0):
            assert await full.get() == 1

    uvloop.run(scenario())


def test_a_cancellation_is_no_timeout() -> None:
    async def scenario() -> None:
        inside = asyncio.Event()

        async def wait() -> None:
            async with timeout(WAIT_S):
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(wait())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    uvloop.run(scenario())


def test_threads_wait_as_long_as_they_may() -> None:
    changed = threading.Condition()
    future: Future[int] = Future()
    begun = awake_s()
    with changed:
        assert not wait_for(changed, lambda: False, 0.02)
    with pytest.raises(TimeoutError):
        result_of(future, 0.02)
    assert awake_s() - begun >= 0.04
    future.set_exception(TimeoutError("its own"))
    with pytest.raises(TimeoutError, match="its own"):
        result_of(future, WAIT_S)
    with changed:
        assert wait_for(changed, lambda: True, 0.0)


def test_a_process_that_was_forked_has_a_clock_of_its_own() -> None:
    awake_s()
    pid = os.fork()
    if pid == 0:
        # Waits as long as it may, and then no more.
        end_s = time.monotonic() + WAIT_S
        begun = awake_s()
        while awake_s() - begun < 2 * MAX_GAP_S and time.monotonic() < end_s:
            time.sleep(0.01)
        os._exit(0 if time.monotonic() < end_s else 1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


# What it waits for comes while it is stopped, or right after, and later than it may wait by other clocks.
_STOPPED = """
import asyncio, threading, time
from concurrent.futures import Future
from anabranch.system.clock import awake_s, result_of, timeout

async def main():
    loop, came, future = asyncio.get_running_loop(), asyncio.Event(), Future()
    threading.Timer(2.0, loop.call_soon_threadsafe, [came.set]).start()
    threading.Timer(2.0, future.set_result, [7]).start()
    awake, real = awake_s(), time.monotonic()
    waiting = asyncio.create_task(asyncio.to_thread(result_of, future, 1.0))
    async with timeout(1.0):
        print("waits", flush=True)
        await came.wait()
    assert await waiting == 7
    print("stood still" if time.monotonic() - real - (awake_s() - awake) > 1.0 else "did not", flush=True)

asyncio.run(main())
"""


def test_a_process_that_was_stopped_counts_none_of_it() -> None:
    command = [sys.executable, "-c", _STOPPED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waits\n"
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(2.5)  # the subject
            os.kill(process.pid, signal.SIGCONT)
            out, err = process.communicate(timeout=WAIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    assert (out, process.returncode) == ("stood still\n", 0), err
