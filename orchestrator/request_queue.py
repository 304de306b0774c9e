"""The requests that wait for a route, in the order of `FairOrder`, and how fast they get one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import NoWorkers
from anabranch.request.request import Request
from orchestrator.attempt import Attempt
from orchestrator.awake_timer import AwakeTimer
from orchestrator.drain_rate import DrainRate
from orchestrator.fair_order import FairOrder, Waiting
from orchestrator.history import History
from orchestrator.inbox import Inbox
from orchestrator.membership import Membership
from orchestrator.router import Router, total_tokens
from orchestrator.standing import Standing
from orchestrator.tenants import Tenants

MIN_RETRY_S, MAX_RETRY_S = 0.1, 60.0
# Where nothing was measured yet.
DEFAULT_RETRY_S = 1.0


class _Item(NamedTuple):
    request: Request
    inbox: Inbox
    history: History


class RequestQueue:
    """Asks the router about its head whenever a route may have come free (`pump`); belongs to one event loop.

    Args:
        tenants: are charged the prompts that workers are given.
    """

    def __init__(self, config: OrchestratorConfig, router: Router, membership: Membership, tenants: Tenants) -> None:
        self._router = router
        self._membership = membership
        self._tenants = tenants
        self._order: FairOrder[_Item] = FairOrder(self._tenants, config.priority_step_s)
        self._waiting: dict[Inbox, Waiting[_Item]] = {}
        # Those that no living path is wide enough for, in the order in which they were to go, and how wide it was.
        self._stranded: dict[Inbox, Waiting[_Item]] = {}
        self._stranded_width = 0
        self._rate = DrainRate()
        self._no_worker_grace_s = config.no_worker_grace_s
        self._absence = Absence(config.no_worker_grace_s, self._end_all)

    def __len__(self) -> int:
        return len(self._waiting) + len(self._stranded)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens that wait."""
        return self._order.num_tokens

    def put(self, request: Request, inbox: Inbox, standing: Standing, history: History) -> None:
        """Let a request wait; its inbox gets the attempt once there is a route, or a Stop.

        Args:
            history: which workers it keeps away from, and whether it wants them for itself.
        """
        self._waiting[inbox] = self._order.put(
            _Item(request, inbox, history),
            standing.account,
            standing.priority,
            len(request.token_ids),
            time.monotonic(),
            given_back=request.epoch > 0,
        )
        self.pump()

    def withdraw(self, inbox: Inbox) -> None:
        """Let the request of this inbox wait no more; another one is left alone."""
        waiting = self._waiting.pop(inbox, None)
        if waiting is not None:
            self._order.remove(waiting)
        self._stranded.pop(inbox, None)

    def pump(self) -> None:
        """Give routes to the head for as long as there are any; called when a worker came, went or has less to do.

        A request that no living path is wide enough for does not hold up those behind it. Where there is no path at
        all, requests wait for one to come back, but not for long.
        """
        if self._membership.serving:
            self._absence.end()
            self._give()
        else:
            self._absence.begin()
            if self._absence.long:
                self._end_all()
        self._rate.waiting(bool(self._order) and self._membership.serving, time.monotonic())

    def _give(self) -> None:
        members = self._membership.members
        widest = self._membership.max_context()
        if widest > self._stranded_width:
            self._take_back_stranded()
        while (head := self._order.head()) is not None:
            request, inbox, history = head.item
            route = self._router.choose(request, members, history.avoid)
            if route is None and total_tokens(request) <= widest:
                break
            if route is not None and history.alone and any(member.num_unproven for member in route.members):
                # Nobody else is given a route meanwhile, so that these come to an end.
                break
            self._order.remove(head)
            del self._waiting[inbox]
            if route is None:
                self._stranded[inbox] = head
                self._stranded_width = widest
                continue
            if request.epoch == 0:
                head.account.charge(len(request.prompt_ids))
            self._rate.given(head.num_tokens, time.monotonic())
            inbox.assign(Attempt(request, route, alone=history.alone))

    def _take_back_stranded(self) -> None:
        for inbox, waiting in reversed(self._stranded.items()):
            self._order.put_back(waiting, given_back=waiting.item.request.epoch > 0)
            self._waiting[inbox] = waiting
        self._stranded.clear()
        self._stranded_width = 0

    # How long it takes ------------------------------------------------------------------------------------

    def wait_s(self, tenant: str, priority: int) -> float | None:
        """About how long a request that comes now will wait; None where nothing was measured."""
        ahead = self._order.tokens_ahead(self._tenants.find(tenant), priority)
        rate = self._rate.tokens_per_s(time.monotonic())
        return None if rate is None else ahead / rate

    def retry_after_s(self, num_tokens: float) -> float:
        """When to try again: once workers will have been given so many prompt tokens."""
        rate = self._rate.tokens_per_s(time.monotonic())
        return DEFAULT_RETRY_S if rate is None else self.bounded_retry_s(num_tokens / rate)

    @staticmethod
    def bounded_retry_s(wait_s: float) -> float:
        """A time to try again that makes sense to a client."""
        return min(max(wait_s, MIN_RETRY_S), MAX_RETRY_S)

    def close(self) -> None:
        """Take back the timer; nobody waits any more."""
        self._absence.end()

    def _end_all(self) -> None:
        missing = self._membership.missing()
        for inbox in (*self._waiting, *self._stranded):
            inbox.stop(NoWorkers(f"no_worker_grace_s: for {self._no_worker_grace_s:g} s {missing}"))


class Absence:
    """Nobody can serve: for a while that is a worker being started again, after that it is what requests are told.

    Args:
        grace_s: how long an absence is short.
        on_long: called when it has become long.
    """

    def __init__(self, grace_s: float, on_long: Callable[[], None]) -> None:
        self._grace_s = grace_s
        self._on_long = on_long
        self._timer: AwakeTimer | None = None
        self.long = False

    def begin(self) -> None:
        """Nobody can serve. A second call changes nothing."""
        if self._timer is None:
            self._timer = AwakeTimer(self._grace_s, self._become_long)

    def end(self) -> None:
        """Somebody can serve, or it matters no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.long = False

    def _become_long(self) -> None:
        self.long = True
        self._on_long()
