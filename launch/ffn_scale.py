"""Follows the orchestrator's word on how many FFN workers there shall be: starts more, or drains the youngest."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from anabranch.system.clock import awake_s
from anabranch_client import Admin, ClientError

logger = logging.getLogger(__name__)

# Between two tries to follow an orchestrator that does not answer.
AGAIN_S = 0.5
STOP_TIMEOUT_S = 5.0
# `ffn_scale_timeout_s`: for a worker to come, or to leave.
SCALE_TIMEOUT_S = 300.0
_POLL_S = 0.05


class FfnWorkers(Protocol):
    """Whoever starts and ends them."""

    def ffn_workers(self) -> tuple[str, ...]:
        """Names of those that live and are not told to leave, the oldest first."""
        ...

    def start_ffn_worker(self) -> str:
        """Start one more; its name. Raises OSError, ConfigError."""
        ...

    def expect_leave(self, name: str) -> None:
        """An orderly end of this one is no death from now on."""
        ...

    def running(self, name: str) -> bool:
        """Whether its process has not ended."""
        ...


class FfnScale:
    """A thread that follows, from construction until `stop`.

    Args:
        admin: closed with this.
        max_workers: most that this machine has room for.
        say: told in words what could not be done.
    """

    def __init__(self, admin: Admin, workers: FfnWorkers, max_workers: int, say: Callable[[str], None]) -> None:
        self._admin = admin
        self._workers = workers
        self._max_workers = max_workers
        self._say = say
        self._following = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ffn-scale", daemon=True)
        self._thread.start()

    def wait_following(self, timeout_s: float) -> bool:
        """Wait until the orchestrator knows of this."""
        return self._following.wait(timeout_s)

    def stop(self) -> None:
        """End; nothing is started after this. Idempotent."""
        self._stopping.set()
        self._admin.close()
        self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                for wanted in self._admin.follow_ffn_scale(self._max_workers):
                    self._following.set()
                    if wanted:
                        self._scale(wanted)
            except ClientError as error:
                logger.debug("not followed: %s", error)
            except ValueError:
                # gRPC's word for a call on a channel that `stop` has closed.
                if not self._stopping.is_set():
                    raise
            self._stopping.wait(AGAIN_S)

    def _scale(self, wanted: int) -> None:
        """Start or drain as many as differ; those that leave do so one after the other."""
        there = self._workers.ffn_workers()
        try:
            started = [self._workers.start_ffn_worker() for _ in range(wanted - len(there))]
        except Exception as error:
            self._say(f"no more ffn workers: {error}")
            return
        # Who has not registered cannot be drained, should the next number be smaller.
        if not self._until(lambda: self._registered(started)):
            self._say(f"ffn_scale_timeout_s: {', '.join(started)} not registered after {SCALE_TIMEOUT_S:g} s")
        for name in reversed(there[wanted:]):
            self._drain(name)

    def _drain(self, name: str) -> None:
        self._workers.expect_leave(name)
        try:
            self._admin.drain(name)
        except ClientError as error:
            self._say(f"{name} is not drained: {error}")
            return
        if not self._until(lambda: not self._workers.running(name)):
            self._say(f"ffn_scale_timeout_s: {name} has not left after {SCALE_TIMEOUT_S:g} s")

    def _registered(self, names: list[str]) -> bool:
        waited_for = [name for name in names if self._workers.running(name)]
        if not waited_for:
            return True
        try:
            return {worker.name for worker in self._admin.cluster().workers} >= set(waited_for)
        except ClientError:
            return False

    def _until(self, condition: Callable[[], bool]) -> bool:
        """Wait, unless this is stopped; False where it takes too long."""
        deadline_s = awake_s() + SCALE_TIMEOUT_S
        while not self._stopping.is_set() and not condition():
            if awake_s() > deadline_s:
                return False
            self._stopping.wait(_POLL_S)
        return True
