"""The driving rank's own queue and thread: commands and steps in the order of sending, as every other rank obeys them.

    engine's thread:   send, send, launch ---> queue ---> this thread: obey, obey, step ---> Launched.result
                       (schedules the next step meanwhile)

A rank with lanes (`LanedRank`) begins steps in this order and goes on with them in turn, between commands.

Because each rank obeys in one order, whoever schedules may give blocks away while a step that uses them is still in
flight: whatever is done with them next is sent later, and happens later, on every rank.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Generic

import torch

from anabranch.engine.activity import Activity
from anabranch.engine.pending import PendingResult
from anabranch.errors import AnabranchError, DeadlineExceeded
from anabranch.step.plan import StepPlan, StepResult
from anabranch.system.clock import result_of
from runtime.rank import Command, LanedRank, Rank

logger = logging.getLogger(__name__)

Failed = Callable[[Exception], Exception]


class Launched:
    """A step on its way.

    Args:
        failed: turns an error into what it means to whoever waits.
    """

    def __init__(self, plan: StepPlan, failed: Failed) -> None:
        self.plan = plan
        self.future: Future[PendingResult] = Future()
        self._failed = failed

    @property
    def done(self) -> bool:
        """Whether `result` returns or raises without waiting for this rank's thread."""
        return self.future.done()

    def result(self, timeout_s: float) -> StepResult:
        """Wait for the step and read what it sampled.

        Raises:
            DeadlineExceeded: not within `timeout_s`.
            WorkerDied: one of several ranks could not; none can go on. With one rank, whatever the step raised.
        """
        try:
            pending = result_of(self.future, timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"step_timeout_s: step {self.plan.step} is not over after {timeout_s} s") from None
        try:
            return pending.result()
        except Exception as error:
            meant = self._failed(error)
            if meant is error:
                raise
            raise meant from error


class ComputeThread(Generic[Command]):
    """Obeys commands and computes steps, one at a time, first come, first served.

    Args:
        rank: what to call.
        num_threads: compute threads of this thread (OpenMP keeps the number per calling thread).
        failed: called with every error, on this thread; returns what it means to whoever waits for the step.

    Attributes:
        activity: the command or step in hand.
    """

    def __init__(self, rank: Rank[Command], num_threads: int, device: torch.device, failed: Failed) -> None:
        self._rank = rank
        self._num_threads = num_threads
        self._device = device
        self._failed = failed
        self.activity = Activity("the compute thread")
        self._queue: queue.SimpleQueue[Command | Launched | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        """Obey `command` once all before it is done. Never blocks."""
        self._queue.put(command)

    def launch(self, plan: StepPlan) -> Launched:
        """Compute a step once all before it is done. Never blocks."""
        launched = Launched(plan, self._failed)
        self._queue.put(launched)
        return launched

    def stop(self, timeout_s: float) -> bool:
        """End after what has been sent; False if that took longer than `timeout_s`. Idempotent."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # NCCL's groups use the current one of the thread that calls
        laned = self._rank if isinstance(self._rank, LanedRank) else None
        while True:
            try:
                item = self._queue.get(block=laned is None or not laned.busy)
            except queue.Empty:
                assert laned is not None
                self._advance(laned)
                continue
            if item is None:
                return
            self.activity.begin()
            if not isinstance(item, Launched):
                self._handle(item)
            elif laned is not None:
                laned.begin(item.plan, partial(self._done, item))
            else:
                self._step(item)
            self.activity.end()

    def _handle(self, command: Command) -> None:
        try:
            self._rank.handle(command)
        except Exception as error:
            if isinstance(error, AnabranchError):
                logger.error("%s: %s", type(command).__name__, error)
            else:
                logger.exception("%s", type(command).__name__)
            self._failed(error)

    def _step(self, launched: Launched) -> None:
        try:
            pending = self._rank.step(launched.plan)
        except Exception as error:
            self._done(launched, error)
        else:
            self._done(launched, pending)

    def _advance(self, laned: LanedRank) -> None:
        self.activity.begin()
        try:
            laned.advance()
        except Exception as error:
            logger.exception("a lane")
            self._failed(error)
        self.activity.end()

    def _done(self, launched: Launched, result: PendingResult | Exception) -> None:
        if isinstance(result, Exception):
            launched.future.set_exception(self._failed(result))
        else:
            launched.future.set_result(result)
