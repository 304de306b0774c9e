"""All requests in flight, and the way of workers' messages to them."""

from __future__ import annotations

import asyncio
import logging

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.config.tenants import parse_tenant_weights
from anabranch.errors import AnabranchError
from anabranch.protocol.workers import Ended, Preempted, PrefillEnded, Reserved, Tokens
from anabranch.request.request import Request
from anabranch.request.token import Token
from orchestrator.client_deadline import ClientDeadline
from orchestrator.lifecycle import Lifecycle
from orchestrator.member import Member
from orchestrator.membership import Membership
from orchestrator.request_queue import RequestQueue
from orchestrator.router import Router
from orchestrator.served_model import ServedModel
from orchestrator.standing import Standing
from orchestrator.tenants import Tenants
from orchestrator.waiting_room import Place, WaitingRoom

logger = logging.getLogger(__name__)


class Dispatcher:
    """Owns one task per request.

    Attributes:
        queue: those that wait for a route.
        room: those that wait for their first token, with those whose prompt is being encoded.
    """

    def __init__(self, config: OrchestratorConfig, model: ServedModel, router: Router, membership: Membership) -> None:
        self._config = config
        self._model = model
        self._membership = membership
        self._tenants = Tenants(parse_tenant_weights(config.tenant_weights))
        self.queue = RequestQueue(config, router, membership, self._tenants)
        self._requests: dict[str, Lifecycle] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.room = WaitingRoom(
            config.max_queued, config.max_queued_bytes, config.max_queued_tokens, self._tenants.weight_of
        )
        self._all_ended = asyncio.Event()
        self._all_ended.set()

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    # Requests ---------------------------------------------------------------------------------------------

    def submit(
        self,
        request: Request,
        accepted_at: float,
        *,
        client_id: str,
        place: Place,
        tenant: str,
        priority: int,
        deadline: ClientDeadline,
    ) -> Lifecycle:
        """Start a request.

        Args:
            request: its id must never have been used before: what workers still say of an earlier request is told
                from this one's by the id alone.
            client_id: the client's name for it, which need not be unique.
            place: in the waiting room; the request leaves it.
            tenant, priority, deadline: what decides when its turn comes.
        """
        request_id = request.request_id
        assert request_id not in self._requests
        standing = Standing(account=self._tenants.open(tenant), priority=priority, deadline=deadline)
        lifecycle = Lifecycle(
            request,
            standing=standing,
            client_id=client_id,
            place=place,
            text=self._model.text_stream(request.sampling),
            queue=self.queue,
            membership=self._membership,
            config=self._config,
            accepted_at=accepted_at,
        )
        logger.debug("accepted request %s", lifecycle.name)
        self._requests[request_id] = lifecycle
        self._all_ended.clear()
        task = asyncio.create_task(lifecycle.run(), name=f"request {request_id}")
        self._tasks[request_id] = task
        deadline.watch(lifecycle.inbox.stop)
        task.add_done_callback(lambda _: self._forget(request_id, standing))
        return lifecycle

    def _forget(self, request_id: str, standing: Standing) -> None:
        standing.deadline.cancel()
        self._tenants.close(standing.account)
        del self._requests[request_id], self._tasks[request_id]
        if not self._requests:
            self._all_ended.set()

    async def wait_until_idle(self) -> None:
        """Wait until no request is in flight."""
        await self._all_ended.wait()

    async def stop_all(self, error: AnabranchError) -> None:
        """End every request with `error`, and wait for it."""
        for lifecycle in self._requests.values():
            lifecycle.inbox.stop(error)
        await self.wait_until_idle()
        self.queue.close()

    # What workers say -------------------------------------------------------------------------------------

    def deliver(self, member: Member, message: Reserved | Tokens | Preempted | PrefillEnded | Ended) -> None:
        """Hand a worker's message to the requests that it is about; unknown ones have ended and are dropped."""
        if not isinstance(message, Tokens):
            lifecycle = self._requests.get(message.request_id)
            if lifecycle is not None:
                lifecycle.inbox.said(member, message)
            return
        by_request: dict[str, list[Token]] = {}
        for token in message.tokens:
            by_request.setdefault(token.request_id, []).append(token)
        for request_id, tokens in by_request.items():
            lifecycle = self._requests.get(request_id)
            if lifecycle is not None:
                lifecycle.inbox.said(member, tuple(tokens))

    def worker_lost(self, member: Member, error: AnabranchError) -> None:
        """A worker is gone: requests that it was given are told, and those that need it end."""
        for lifecycle in self._requests.values():
            lifecycle.inbox.lost(member, error)

    def check_integrity(self) -> None:
        """Assert that nothing is left of any request; to be called when idle."""
        assert not self._requests, f"requests: {list(self._requests)}"
        assert not self._tasks, f"tasks: {list(self._tasks)}"
        assert not self.queue, f"queue: {len(self.queue)}"
        waiting = self.room.num_places, self.room.num_bytes, self.room.num_tokens
        assert waiting == (0, 0, 0), f"waiting room: {waiting[0]} places, {waiting[1]} bytes, {waiting[2]} tokens"
        for member in self._membership.members:
            assert member.num_requests == 0, f"{member.name} counts {member.num_requests} requests"
            assert member.prefill_tokens == 0, f"{member.name} counts {member.prefill_tokens} prompt tokens"
