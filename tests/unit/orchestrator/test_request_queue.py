"""In what order requests get their routes, and what they are told where there is none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence

import pytest

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import NoWorkers
from anabranch.request.request import Request
from anabranch.system.clock import MAX_GAP_S
from orchestrator.client_deadline import ClientDeadline
from orchestrator.history import History
from orchestrator.inbox import Inbox
from orchestrator.member import Member
from orchestrator.request_queue import DEFAULT_RETRY_S, MAX_RETRY_S, MIN_RETRY_S, RequestQueue
from orchestrator.router import Route
from orchestrator.standing import Standing
from orchestrator.tenants import Account, Tenants
from tests.unit.orchestrator.test_router import member, request

pytestmark = pytest.mark.unit


class Workers:
    """What the queue reads of the membership."""

    def __init__(self, *members: Member) -> None:
        self.members = list(members)

    def max_context(self) -> int:
        return max((worker.info.max_context for worker in self.members), default=0)

    @property
    def serving(self) -> bool:
        return bool(self.members)

    def missing(self) -> NoWorkers | None:
        return None if self.serving else NoWorkers("nobody is there")


class OneAtATime:
    """A router that gives a worker one request."""

    def choose(
        self, request: Request, members: Sequence[Member], avoid: Collection[Member] = frozenset()
    ) -> Route | None:
        wide = (m for m in members if m.num_requests == 0 and m.info.max_context >= len(request.prompt_ids) + 10)
        return next(map(Route, wide), None)


def queue_for(workers: Workers, **changes: object) -> RequestQueue:
    return RequestQueue(OrchestratorConfig(model="m", **changes), OneAtATime(), workers, Tenants({}))


def standing(tenant: Account | None = None, priority: int = 0) -> Standing:
    return Standing(account=tenant or Account("", 1.0), priority=priority, deadline=ClientDeadline(None))


def fresh() -> History:
    return History(max_recoveries=3, max_given_back=8)


def again(request_id: str) -> Request:
    given = request(request_id=request_id)
    return Request(request_id=request_id, epoch=1, prompt_ids=given.prompt_ids, sampling=given.sampling)


def test_first_come_first_served_behind_those_that_were_given_back():
    async def scenario():
        worker = member("c", "colocated")
        queue = queue_for(Workers(worker))
        asked = [
            request(request_id="running"),
            request(request_id="a"),
            again("x"),
            request(request_id="b"),
            again("y"),
        ]
        inboxes = {given.request_id: Inbox() for given in asked}
        tenant = standing()
        for given in asked:
            queue.put(given, inboxes[given.request_id], tenant, fresh())
        queue.withdraw(inboxes["b"])
        queue.withdraw(inboxes["running"])
        assert len(queue) == 3
        order = []
        for _ in range(4):
            (name,) = [name for name, inbox in inboxes.items() if inbox.attempt is not None]
            order.append(name)
            inboxes[name].attempt.close()
            inboxes[name].attempt = None
            queue.pump()
        assert order == ["running", "x", "y", "a"]
        assert len(queue) == 0
        assert (worker.num_requests, worker.prefill_tokens) == (0, 0)

    asyncio.run(scenario())


def test_one_that_nobody_is_wide_enough_for_holds_up_nobody():
    async def scenario():
        workers = Workers(member("small", "colocated", max_context=100))
        queue = queue_for(workers)
        wide, narrow = Inbox(), Inbox()
        queue.put(request(num_prompt=500), wide, standing(), fresh())
        queue.put(request(), narrow, standing(), fresh())
        assert narrow.attempt is not None
        assert wide.attempt is None
        workers.members.append(member("large", "colocated"))
        queue.pump()
        assert wide.attempt.route.names == ("large",)

    asyncio.run(scenario())


def test_without_workers_all_are_told_after_a_while():
    async def scenario():
        queue = queue_for(Workers(), no_worker_grace_s=0.01)
        inboxes = [Inbox(), Inbox()]
        for inbox in inboxes:
            queue.put(request(), inbox, standing(), fresh())
            inbox.allow("queue_timeout_s", 60.0, "queued")
        for inbox in inboxes:
            with pytest.raises(NoWorkers, match=r"no_worker_grace_s: for 0.01 s nobody is there"):
                await inbox.next()
        # One that comes later has no grace of its own left.
        late = Inbox()
        late.allow("queue_timeout_s", 60.0, "queued")
        queue.put(request(), late, standing(), fresh())
        with pytest.raises(NoWorkers):
            await late.next()
        queue.close()

    asyncio.run(scenario())


def test_what_this_process_was_held_up_for_is_no_absence():
    async def scenario():
        workers = Workers()
        queue = queue_for(workers, no_worker_grace_s=2 * MAX_GAP_S)
        inbox = Inbox()
        queue.put(request(), inbox, standing(), fresh())
        inbox.allow("queue_timeout_s", 60.0, "queued")
        time.sleep(4 * MAX_GAP_S)  # noqa: ASYNC251  # the subject
        for _ in range(10):
            await asyncio.sleep(0)
        workers.members.append(member("c", "colocated"))
        queue.pump()
        assert (await inbox.next()).attempt.route.names == ("c",)
        queue.close()

    asyncio.run(scenario())


def test_wide_ones_keep_their_turn_while_nobody_can_take_them():
    async def scenario():
        workers = Workers(member("small", "colocated", max_context=100))
        queue = queue_for(workers)
        inboxes = {name: Inbox() for name in ("wide", "wide too", "running", "narrow")}
        for name, inbox in inboxes.items():
            queue.put(request(num_prompt=500 if "wide" in name else 10), inbox, standing(), fresh())
        assert inboxes["running"].attempt is not None
        assert len(queue) == 3
        asked = []
        queue._router.choose = lambda request, members, avoid: asked.append(len(request.prompt_ids))
        for _ in range(5):
            queue.pump()
        # The wide ones are not asked about again and again.
        assert asked == [10] * 5
        del queue._router.choose
        large = member("large", "colocated")
        workers.members.append(large)
        order = []
        for _ in range(2):
            queue.pump()
            (name,) = [
                name for name, inbox in inboxes.items() if inbox.attempt and "large" in inbox.attempt.route.names
            ]
            order.append(name)
            inboxes[name].attempt.close()
            inboxes[name].attempt = None
        assert order == ["wide", "wide too"]
        queue.withdraw(inboxes["narrow"])
        assert len(queue) == 0

    asyncio.run(scenario())


def test_a_prompt_is_charged_once_and_when_workers_are_given_it():
    async def scenario():
        worker = member("c", "colocated")
        queue = queue_for(Workers(worker))
        one, other = Account("one", 1.0), Account("other", 2.0)
        inboxes = [Inbox(), Inbox(), Inbox()]
        queue.put(request(), inboxes[0], standing(one), fresh())
        queue.put(request(), inboxes[1], standing(other), fresh())
        # The other comes when nobody waits: it is lifted to who waited last.
        assert (one.counter, other.counter) == (10.0, 10.0)
        inboxes[0].attempt.close()
        queue.pump()
        assert other.counter == 10.0 + 10 / 2
        inboxes[1].attempt.close()
        queue.put(again("x"), inboxes[2], standing(one), fresh())
        # Lifted as well; a prompt that is computed again costs nothing.
        assert one.counter == 15.0

    asyncio.run(scenario())


def test_how_long_a_wait_will_be_and_when_to_try_again(monkeypatch):
    async def scenario():
        now = [1000.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        worker = member("c", "colocated")
        queue = queue_for(Workers(worker))
        assert queue.wait_s("", 0) is None
        assert queue.retry_after_s(10_000) == DEFAULT_RETRY_S
        running = [Inbox() for _ in range(41)]
        for inbox in running:
            queue.put(request(), inbox, standing(), fresh())
        # Ten tokens each tenth of a second.
        for inbox in running[:20]:
            now[0] += 0.1
            inbox.attempt.close()
            queue.pump()
        assert len(queue) == 20
        assert queue.num_tokens == 200
        assert queue.retry_after_s(queue.num_tokens) == pytest.approx(2.0, rel=0.1)
        assert queue.wait_s("nobody", 1) == pytest.approx(2.0, rel=0.1)
        assert queue.wait_s("nobody", -1) == 0.0
        assert queue.retry_after_s(1) == MIN_RETRY_S
        assert queue.retry_after_s(10**9) == MAX_RETRY_S

    asyncio.run(scenario())
