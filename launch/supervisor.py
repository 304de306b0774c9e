"""Starts workers again that died, each under its name: died -> waiting -> started -> back, or it stays away."""

from __future__ import annotations

import threading
from collections.abc import Callable

from anabranch.config.topology import RestartConfig
from anabranch.errors import AnabranchError
from anabranch.system.clock import awake_s
from launch.restarts import Restarts

STOP_TIMEOUT_S = 5.0
_POLL_S = 0.1


class Supervisor:
    """A thread that starts what is due, from construction until `stop`.

    Args:
        start: starts a process by name. Raises OSError, AnabranchError.
        back: whether all workers of a process that was started are registered.
        say: told in a line that one is back, or cannot be started.
    """

    def __init__(
        self,
        config: RestartConfig,
        start: Callable[[str], None],
        back: Callable[[str], bool],
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._start = start
        self._back = back
        self._say = say
        # Guards what follows, and tells of changes.
        self._changed = threading.Condition()
        self._restarts: dict[str, Restarts] = {}
        self._due_s: dict[str, float] = {}
        self._started: set[str] = set()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def died(self, name: str) -> float | None:
        """Seconds until a process that has ended is started again; None: it stays away."""
        if self._config.policy == "never":
            return None
        with self._changed:
            if self._stopping:
                return None
            self._started.discard(name)
            now_s = awake_s()
            restarts = self._restarts.setdefault(name, Restarts(self._config.max_per_10min))
            wait_s = restarts.died(now_s)
            if wait_s is not None:
                self._due_s[name] = now_s + wait_s
                self._changed.notify_all()
            return wait_s

    def expects(self, name: str) -> bool:
        """Whether a process that has ended will be started."""
        with self._changed:
            return name in self._due_s

    def forget(self, name: str) -> None:
        """Nobody wants it any more."""
        with self._changed:
            self._due_s.pop(name, None)
            self._started.discard(name)

    def stop(self) -> None:
        """Start nothing after this. Idempotent."""
        with self._changed:
            self._stopping = True
            self._due_s.clear()
            self._changed.notify_all()
        self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._stopping:
                    return
                now_s = awake_s()
                due = [name for name, due_s in self._due_s.items() if due_s <= now_s]
                started = tuple(self._started)
                if not due and not started:
                    wait_s = min(self._due_s.values(), default=now_s + STOP_TIMEOUT_S) - now_s
                    self._changed.wait(max(0.0, wait_s))
                    continue
            for name in due:
                self._start_again(name)
            for name in started:
                if self._back(name) and self._take_back(name):
                    self._say(f"{name} is back")
            with self._changed:
                if not self._stopping:
                    self._changed.wait(_POLL_S)

    def _start_again(self, name: str) -> None:
        with self._changed:
            if self._stopping or self._due_s.pop(name, None) is None:
                return
            self._started.add(name)
        try:
            self._start(name)
        except (OSError, AnabranchError) as error:
            wait_s = self.died(name)
            then = "it stays away" if wait_s is None else f"again in {wait_s:g} s"
            self._say(f"{name} cannot be started ({error}); {then}")

    def _take_back(self, name: str) -> bool:
        with self._changed:
            there = name in self._started
            self._started.discard(name)
            return there
