"""The engine's thread: commands and scheduling, one at a time, so that schedulers need no locks.

inbox (any thread) -> command -> command -> step -> command -> step -> ... -> (idle: waits for the inbox)
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from anabranch.engine.activity import Activity
from anabranch.engine.faults import Faults


class EngineLoop:
    """Runs `step` for as long as it says that there is work; commands come in between.

    An exception that either lets through is a bug: it is logged, and the loop goes on. Where steps do nothing but
    raise, no more are run; commands still are.

    Args:
        name: of the thread.
        step: schedules; returns False when there is nothing to do before the next command.
        broken: called once, on the thread, with the error for which no more steps are run.

    Attributes:
        activity: the command or step that is run.
    """

    def __init__(self, name: str, step: Callable[[], bool], broken: Callable[[Exception], None]) -> None:
        self.activity = Activity("the engine's thread")
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._step = step
        self._on_broken = broken
        self._broken = False
        self._step_faults = Faults("a step of the engine")
        self._command_faults = Faults("a command to the engine")
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def num_waiting(self) -> int:
        """Commands that have not been run."""
        return self._inbox.qsize()

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
                busy = self._run_step()
                continue
            if command is None:
                return
            self._run_command(command)
            busy = not self._broken

    def _run_step(self) -> bool:
        """Whether there may be more to do at once."""
        self.activity.begin()
        try:
            busy = self._step()
        except Exception as error:
            if self._step_faults.failed(error):
                self._broken = True
                self._on_broken(error)
            return not self._broken
        finally:
            self.activity.end()
        self._step_faults.passed()
        return busy

    def _run_command(self, command: Callable[[], None]) -> None:
        self.activity.begin()
        try:
            command()
        except Exception as error:
            self._command_faults.log(error)
        finally:
            self.activity.end()
