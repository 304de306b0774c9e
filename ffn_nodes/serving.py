"""The compute thread of an FFN worker: calls in, answers out, and between two products whatever it is told.

poll -> waiting, by layer -> the layer whose oldest call has waited longest: one product -> its answers
(nothing waits: sleep in the listener until a call comes or somebody wakes it)
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import torch

from anabranch.engine.activity import Activity
from anabranch.engine.faults import Faults
from anabranch.errors import AnabranchError, DeadlineExceeded, WorkerDied
from anabranch.system.clock import result_of
from ffn_nodes.experts import Experts, NodeExperts
from ffn_nodes.product import Product
from ffn_nodes.row_counts import Counts
from ffn_nodes.waiting_calls import WaitingCalls
from transport.m2n.base import Arrived, Listener
from transport.m2n.messages import Answer, Status

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5


class Serving:
    """Serves rows to whoever links to the listener; the listener is this thread's, and closed by it.

    Args:
        num_threads: compute threads.
        merge_wait_s: see `WaitingCalls`.
        on_failure: called when it cannot go on, on its thread.

    Attributes:
        activity: the product in hand.
        num_computing: calls of that product.
        num_waiting: calls that wait for theirs.
        num_links: attention ranks that are linked.
        num_products, num_rows, busy_s: since the start; see `FfnLoad`.
    """

    def __init__(
        self,
        listener: Listener,
        experts: NodeExperts,
        *,
        num_threads: int,
        merge_wait_s: float,
        on_failure: Callable[[AnabranchError], None],
    ) -> None:
        self.activity = Activity("the compute thread")
        self.num_computing = self.num_waiting = self.num_links = 0
        self.num_products = self.num_rows = 0
        self.busy_s = 0.0
        self._listener = listener
        self._experts = experts
        self._num_threads = num_threads
        self._on_failure = on_failure
        self._faults = Faults("a product")
        self._product = Product(experts, self._product_failed)
        self._waiting = WaitingCalls(merge_wait_s)
        self._excess: Experts = frozenset()
        self._told: queue.SimpleQueue[tuple[Experts, Future[None]]] = queue.SimpleQueue()
        self._ending = False
        # Whoever wakes the listener finds it open.
        self._waking = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End after the product in hand; False if that took longer than `timeout_s`. Idempotent."""
        self._ending = True
        self._wake()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def take_row_counts(self) -> Counts | None:
        """See `RowCounts.take`; from any thread."""
        return self._product.row_counts.take()

    def set_excess(self, excess: Experts, timeout_s: float) -> None:
        """Say what to drop as soon as no call that waits needs it, in place of what was said before.

        Returns once nothing else will be dropped; what is excess may be held a little longer.

        Raises:
            DeadlineExceeded: the thread has not come to it in time.
        """
        done: Future[None] = Future()
        self._told.put((excess, done))
        self._wake()
        try:
            result_of(done, timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"step_stall_s: the compute thread did not listen for {timeout_s:g} s") from None

    def _wake(self) -> None:
        with self._waking:
            if not self._closed:
                self._listener.wake()

    # On its own thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        if self._experts.device.type == "cuda":
            torch.cuda.set_device(self._experts.device)  # NCCL's groups use the current one of the thread that calls
        try:
            with torch.inference_mode():
                while not self._ending:
                    self._turn()
        except Exception as error:
            logger.exception("the compute thread")
            self._on_failure(WorkerDied(f"the compute thread cannot go on: {type(error).__name__}: {error}"))
        finally:
            with self._waking:
                self._closed = True
                self._listener.close()
            self.num_links = 0

    def _turn(self) -> None:
        for arrived in self._listener.poll():
            self._waiting.add(arrived)
        self.num_links = self._listener.num_links
        self._obey()
        now_s = time.monotonic()
        calls = self._waiting.take(now_s, self.num_links)
        # In this order, so that who reads both never misses a call.
        self.num_computing = len(calls)
        self.num_waiting = len(self._waiting)
        if not calls:
            self._listener.wait(self._waiting.ready_in_s(now_s, IDLE_WAIT_S))
            return
        self.activity.begin()
        self._answer(calls)
        self.num_computing = 0
        self.busy_s += time.monotonic() - now_s
        self.activity.end()

    def _obey(self) -> None:
        while not self._told.empty():
            self._excess, done = self._told.get()
            done.set_result(None)
        if self._excess and not self._waiting.name_any(self._excess):
            self._experts.drop(self._excess)
            logger.info("dropped %d experts", len(self._excess))
            self._excess = frozenset()

    def _answer(self, calls: list[Arrived]) -> None:
        began_s = time.monotonic()
        made = self._product.compute([arrived.call for arrived in calls])
        compute_us = _us(time.monotonic() - began_s)
        merged_rows = sum(arrived.call.rows_TC.shape[0] for arrived in calls)
        self.num_products += 1
        self.num_rows += merged_rows
        if any(status is Status.OK for status, _ in made):
            self._faults.passed()
        for arrived, (status, rows_RC) in zip(calls, made, strict=True):
            answer = Answer(
                ticket=arrived.call.ticket,
                attempt=arrived.call.attempt,
                status=status,
                rows_RC=rows_RC,
                queue_us=_us(began_s - arrived.arrived_s),
                compute_us=compute_us,
                merged_rows=merged_rows,
            )
            self._listener.answer(arrived, answer)

    def _product_failed(self, error: Exception) -> None:
        if self._faults.failed(error):
            self._on_failure(WorkerDied(f"every product fails, at last with {type(error).__name__}: {error}"))


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1e6))
