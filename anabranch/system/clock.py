"""Time for judging others: what the judge was held up for does not count.

A process that was stopped (a closed lid, SIGSTOP, a frozen container) and goes on finds that much time has passed
while nothing was heard. Its deadlines would all be over at once, although those it waits for were stopped as well,
or have answered and their answer waits in a socket. So deadlines are kept on a clock that stands still meanwhile:
somebody ticks it regularly, and between two ticks at most `MAX_GAP_S` count.

    awake_s()       any thread: stands still while this process does
    loop_clock()    an event loop's: also stands still while the loop is held up
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

TICK_S = 0.1
# Ticks that are merely late, on a busy machine, count in full.
MAX_GAP_S = 0.3


class AwakeClock:
    """Seconds that were seen to pass. One thread ticks, any thread reads.

    Args:
        max_gap_s: most seconds that count between two ticks.
        clock: gives seconds.
    """

    def __init__(self, *, max_gap_s: float = MAX_GAP_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_gap_s = max_gap_s
        self._clock = clock
        now_s = clock()
        # The last tick, on this clock and on `clock`: one value, so that readers see both or neither change.
        self._ticked = (now_s, now_s)

    def now(self) -> float:
        """Seconds; only differences matter. Never goes back."""
        awake_s, at_s = self._ticked
        return awake_s + min(self._clock() - at_s, self._max_gap_s)

    def tick(self) -> None:
        """Go on; to be called at least every `max_gap_s`."""
        awake_s, at_s = self._ticked
        now_s = self._clock()
        self._ticked = (awake_s + min(now_s - at_s, self._max_gap_s), now_s)


class _ProcessClock:
    """This process's clock and the thread that ticks it, from its first use on."""

    def __init__(self) -> None:
        self._registered = False
        self._clock: AwakeClock | None = None
        self._starting = threading.Lock()

    def now(self) -> float:
        clock = self._clock
        return self._start().now() if clock is None else clock.now()

    def _start(self) -> AwakeClock:
        with self._starting:
            if not self._registered:
                self._registered = True
                os.register_at_fork(after_in_child=self._forget)
            if self._clock is None:
                clock = AwakeClock()
                threading.Thread(target=_tick_for_ever, args=(clock,), name="clock", daemon=True).start()
                self._clock = clock
            return self._clock

    def _forget(self) -> None:
        """A process that was forked has the clock and not the thread: it starts its own."""
        self._clock = None
        self._starting = threading.Lock()


def _tick_for_ever(clock: AwakeClock) -> None:
    while True:
        time.sleep(TICK_S)
        clock.tick()


_process = _ProcessClock()
_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AwakeClock] = weakref.WeakKeyDictionary()


def awake_s() -> float:
    """Seconds, like `time.monotonic`, that stand still while this process is stopped. From any thread."""
    return _process.now()


def loop_clock() -> AwakeClock:
    """The running event loop's clock, which the loop itself ticks. For code on that loop."""
    loop = asyncio.get_running_loop()
    clock = _loops.get(loop)
    if clock is None:
        clock = _loops[loop] = AwakeClock()
        _tick_on(loop, clock)
    return clock


def _tick_on(loop: asyncio.AbstractEventLoop, clock: AwakeClock) -> None:
    clock.tick()
    loop.call_later(TICK_S, _tick_on, loop, clock)


class timeout_at:
    """`asyncio.timeout_at` on `loop_clock()`: ends what it surrounds with TimeoutError.

    Args:
        deadline_s: on the loop's clock.
    """

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s

    async def __aenter__(self) -> timeout_at:
        self._loop = asyncio.get_running_loop()
        self._clock = loop_clock()
        # Without a time of its own: `_expire` says when it is over.
        self._scope = asyncio.timeout(None)
        await self._scope.__aenter__()
        self._look()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        await self._scope.__aexit__(kind, error, trace)

    def _look(self) -> None:
        self._timer = self._loop.call_later(max(0.0, self._deadline_s - self._clock.now()), self._expire)

    def _expire(self) -> None:
        if self._clock.now() < self._deadline_s:
            self._look()
        else:
            self._scope.reschedule(self._loop.time())


def timeout(limit_s: float) -> timeout_at:
    """`asyncio.timeout` on `loop_clock()`."""
    return timeout_at(loop_clock().now() + limit_s)


def wait_for(changed: threading.Condition, ready: Callable[[], object], limit_s: float) -> bool:
    """`changed.wait_for(ready, limit_s)` on `awake_s`; whether `ready` in the end."""
    deadline_s = awake_s() + limit_s
    while not ready():
        left_s = deadline_s - awake_s()
        if left_s <= 0.0:
            return False
        changed.wait(left_s)
    return True


def result_of(future: Future[T], limit_s: float) -> T:
    """`future.result(limit_s)` on `awake_s`. Raises TimeoutError, or what the future holds."""
    deadline_s = awake_s() + limit_s
    while True:
        left_s = deadline_s - awake_s()
        try:
            return future.result(max(0.0, left_s))
        except TimeoutError:
            if future.done():
                return future.result()
            if left_s <= 0.0:
                raise
