"""The progress thread of a plane: file descriptors, calls handed over from other threads, and a tick."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 10.0
# Selectors sleep in whole milliseconds.
MIN_SELECT_S = 0.001


class ProgressLoop:
    """One daemon thread that runs ready callbacks, then `tick`, then sleeps as long as `tick` allows.

    Args:
        name: of the thread.
        tick: called once for each turn; returns how many seconds the thread may sleep (0: not at all). Below
            `MIN_SELECT_S` the thread dozes: only `wake` ends that early, descriptors are looked at afterwards.
    """

    def __init__(self, name: str, tick: Callable[[], float]) -> None:
        self._tick = tick
        self._selector = selectors.DefaultSelector()
        self._calls: deque[Callable[[], None]] = deque()
        self._sleeping = False
        self._dozing = False
        # Held but for a moment after a ring. A queue.SimpleQueue would do, but its `get` can miss its timeout for good.
        self._bell = threading.Lock()
        self._bell.acquire()
        self._running = True
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._drain_wake)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call_soon(self, call: Callable[[], None]) -> None:
        """Run `call` on the progress thread. From any thread."""
        self._calls.append(call)
        self.wake()

    def wake(self) -> None:
        """Let the thread take another turn. Cheap where it is awake."""
        if self._dozing:
            self._dozing = False
            with contextlib.suppress(RuntimeError):  # somebody else rang
                self._bell.release()
        # The loop sets `_sleeping` before it looks at its queues for the last time, so no wake is missed.
        if self._sleeping:
            self._sleeping = False
            try:
                os.write(self._wake_write, b"\0")
            except BlockingIOError:
                pass  # full: it will wake
            except OSError:
                if self._running:
                    raise

    def watch(self, fd: int, events: int, call: Callable[[], None]) -> None:
        """Run `call` whenever `fd` is ready; also changes the events of an fd that is watched already."""
        try:
            self._selector.modify(fd, events, call)
        except KeyError:
            self._selector.register(fd, events, call)

    def unwatch(self, fd: int) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    def stop(self, cleanup: Callable[[], None]) -> None:
        """Run `cleanup` on the thread, end it, and release its descriptors. Not from the thread itself."""

        def last() -> None:
            try:
                cleanup()
            finally:
                self._running = False

        if self._thread.ident is None:  # never started
            last()
        else:
            self.call_soon(last)
            self._thread.join(JOIN_TIMEOUT_S)
        if self._thread.is_alive():
            logger.error("%s did not end within %.0f s", self._thread.name, JOIN_TIMEOUT_S)
            return
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)

    def _run(self) -> None:
        calls = self._calls
        while self._running:
            while calls:
                self._guard(calls.popleft())
            timeout_s = 0.0
            try:
                timeout_s = self._tick()
            except Exception:
                logger.exception("%s: tick failed", self._thread.name)
                time.sleep(0.01)  # a fault that repeats must not burn the core
            if 0.0 < timeout_s < MIN_SELECT_S:
                self._doze(timeout_s)
                timeout_s = 0.0
            elif timeout_s > 0.0:
                self._sleeping = True
                if calls or not self._running:
                    self._sleeping = False
                    timeout_s = 0.0
            for key, _ in self._selector.select(timeout_s):
                self._sleeping = False
                # One callback may end what another of the same turn is for, and its descriptor may be another's now.
                if self._watches(key):
                    self._guard(key.data)
            self._sleeping = False

    def _watches(self, key: selectors.SelectorKey) -> bool:
        now = self._selector.get_map().get(key.fd)
        return now is not None and now.data is key.data

    def _doze(self, timeout_s: float) -> None:
        self._dozing = True
        if not self._calls:
            self._bell.acquire(timeout=timeout_s)
        self._dozing = False

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            logger.exception("%s: callback failed", self._thread.name)
