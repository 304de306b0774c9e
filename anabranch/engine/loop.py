"""The engine's thread: commands and scheduling, one at a time, so that schedulers need no locks.

inbox (any thread) -> command -> command -> step -> command -> step -> ... -> (idle: waits for the inbox)
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class EngineLoop:
    """Runs `step` for as long as it says that there is work; commands come in between.

    An exception that either lets through is a bug: it is logged, and the loop goes on.

    Args:
        name: of the thread.
        step: schedules; returns False when there is nothing to do before the next command.
    """

    def __init__(self, name: str, step: Callable[[], bool]) -> None:
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._step = step
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, command: Callable[[], None]) -> None:
        """Run `command` on the engine's thread, before its next step."""
        self._inbox.put(command)

    def stop(self, timeout_s: float) -> bool:
        """End the thread after the step in progress; False if that took longer than `timeout_s`."""
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        busy = True
        while True:
            try:
                command = self._inbox.get_nowait() if busy else self._inbox.get()
            except queue.Empty:
                busy = self._guard(self._step)
                continue
            if command is None:
                return
            self._guard(command)
            busy = True

    def _guard(self, action: Callable[[], bool | None]) -> bool:
        try:
            return bool(action())
        except Exception:
            logger.exception("engine")
            return True
