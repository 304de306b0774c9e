"""All requests in flight: their queue for a route, and the way of workers' messages to them."""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import AnabranchError, NoWorkers
from anabranch.protocol.workers import Ended, Paused, PrefillEnded, Reserved, Tokens, ToWorker
from anabranch.request.request import Request
from anabranch.request.token import Token
from orchestrator.absence import Absence
from orchestrator.lifecycle import Lifecycle
from orchestrator.membership import Member, Membership
from orchestrator.router import Router, total_tokens
from orchestrator.served_model import ServedModel
from orchestrator.waiting_room import Place, WaitingRoom

logger = logging.getLogger(__name__)


class Dispatcher:
    """Owns one task per request. The queue is first come, first served; requests that workers gave back go first.

    Args:
        membership: set by `attach` where it needs this dispatcher for its own construction.
    """

    def __init__(self, config: OrchestratorConfig, model: ServedModel, router: Router) -> None:
        self._config = config
        self._model = model
        self._router = router
        self._membership: Membership | None = None
        self._requests: dict[str, Lifecycle] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._queue: deque[Lifecycle] = deque()
        self._absence = Absence(config.no_worker_grace_s, self._end_queued)
        self.room = WaitingRoom(config.max_queued, config.max_queued_bytes)
        self._all_ended = asyncio.Event()
        self._all_ended.set()

    def attach(self, membership: Membership) -> None:
        self._membership = membership

    @property
    def membership(self) -> Membership:
        assert self._membership is not None
        return self._membership

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    # Requests ---------------------------------------------------------------------------------------------

    def submit(self, request: Request, accepted_at: float, *, client_id: str, place: Place) -> Lifecycle:
        """Start a request.

        Args:
            request: its id must never have been used before: what workers still say of an earlier request is told
                from this one's by the id alone.
            client_id: the client's name for it, which need not be unique.
            place: in the waiting room; the request leaves it.
        """
        request_id = request.request_id
        assert request_id not in self._requests
        sampling = request.sampling
        lifecycle = Lifecycle(
            request,
            client_id=client_id,
            place=place,
            text=self._model.text_stream(sampling),
            silent_ids=frozenset(sampling.stop_token_ids),
            cluster=self,
            config=self._config,
            accepted_at=accepted_at,
        )
        logger.debug("accepted request %s", lifecycle.name)
        self._requests[request_id] = lifecycle
        self._all_ended.clear()
        task = asyncio.create_task(lifecycle.run(), name=f"request {request_id}")
        self._tasks[request_id] = task
        task.add_done_callback(lambda _: self._forget(request_id))
        return lifecycle

    def _forget(self, request_id: str) -> None:
        del self._requests[request_id], self._tasks[request_id]
        if not self._requests:
            self._all_ended.set()

    async def wait_until_idle(self) -> None:
        """Wait until no request is in flight."""
        await self._all_ended.wait()

    async def stop_all(self, error: AnabranchError) -> None:
        """End every request with `error`, and wait for it."""
        for lifecycle in self._requests.values():
            lifecycle.stop(error)
        await self.wait_until_idle()
        self._absence.end()

    # What lifecycles ask for ------------------------------------------------------------------------------

    def enqueue(self, lifecycle: Lifecycle, *, first: bool) -> None:
        num_given_back = sum(queued.request.epoch > 0 for queued in self._queue)
        self._queue.insert(num_given_back if first else len(self._queue), lifecycle)
        self.pump()

    def withdraw(self, lifecycle: Lifecycle) -> None:
        if lifecycle in self._queue:
            self._queue.remove(lifecycle)

    def work_released(self) -> None:
        self.pump()

    async def send(self, member: Member, message: ToWorker) -> None:
        await self.membership.send(member, message)

    def mark_draining(self, member: Member) -> None:
        self.membership.mark_draining(member)

    def pump(self) -> None:
        """Give routes to the queue's head for as long as there are any.

        A request that no living path is wide enough for does not hold up those behind it. Where there is no path at
        all, requests wait for one to come back, but not for long.
        """
        if self.membership.serving:
            self._absence.end()
        else:
            self._absence.begin()
            if self._absence.long:
                self._end_queued()
        members = self.membership.members
        widest = self.membership.max_context()
        passed_over: list[Lifecycle] = []
        while self._queue:
            lifecycle = self._queue[0]
            route = self._router.choose(lifecycle.request, members)
            if route is None and total_tokens(lifecycle.request) <= widest:
                break
            self._queue.popleft()
            if route is None:
                passed_over.append(lifecycle)
            else:
                lifecycle.assign(route)
        self._queue.extendleft(reversed(passed_over))

    def _end_queued(self) -> None:
        missing = self.membership.missing()
        for lifecycle in self._queue:
            lifecycle.stop(NoWorkers(f"no_worker_grace_s: for {self._config.no_worker_grace_s:g} s {missing}"))

    # What workers say -------------------------------------------------------------------------------------

    def deliver(self, member: Member, message: Reserved | Tokens | Paused | PrefillEnded | Ended) -> None:
        """Hand a worker's message to the requests that it is about; unknown ones have ended and are dropped."""
        if not isinstance(message, Tokens):
            lifecycle = self._requests.get(message.request_id)
            if lifecycle is not None:
                lifecycle.deliver(member, message)
            return
        by_request: dict[str, list[Token]] = {}
        for token in message.tokens:
            by_request.setdefault(token.request_id, []).append(token)
        for request_id, tokens in by_request.items():
            lifecycle = self._requests.get(request_id)
            if lifecycle is not None:
                lifecycle.deliver(member, tuple(tokens))

    def worker_lost(self, member: Member, error: AnabranchError) -> None:
        """A worker is gone: every request hears it, those that need it end."""
        for lifecycle in self._requests.values():
            lifecycle.worker_lost(member, error)

    def check_integrity(self) -> None:
        """Assert that nothing is left of any request; to be called when idle."""
        assert not self._requests, f"requests: {list(self._requests)}"
        assert not self._tasks, f"tasks: {list(self._tasks)}"
        assert not self._queue, f"queue: {len(self._queue)}"
        waiting = self.room.num_places, self.room.num_bytes
        assert waiting == (0, 0), f"waiting room: {waiting[0]} places, {waiting[1]} bytes"
        for member in self.membership.members:
            assert member.num_requests == 0, f"{member.name} counts {member.num_requests} requests"
            assert member.prefill_tokens == 0, f"{member.name} counts {member.prefill_tokens} prompt tokens"
