"""The requests that wait for a route: first come, first served; those that workers gave back go first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import NoWorkers
from anabranch.request.request import Request
from orchestrator.attempt import Attempt
from orchestrator.awake_timer import AwakeTimer
from orchestrator.history import History
from orchestrator.inbox import Inbox
from orchestrator.membership import Membership
from orchestrator.router import Router, total_tokens


class _Waiting(NamedTuple):
    request: Request
    inbox: Inbox
    history: History


class RequestQueue:
    """Asks the router about its head whenever a route may have come free (`pump`); belongs to one event loop."""

    def __init__(self, config: OrchestratorConfig, router: Router, membership: Membership) -> None:
        self._router = router
        self._membership = membership
        self._waiting: deque[_Waiting] = deque()
        self._no_worker_grace_s = config.no_worker_grace_s
        self._absence = Absence(config.no_worker_grace_s, self._end_all)

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, request: Request, inbox: Inbox, history: History) -> None:
        """Let a request wait; its inbox gets the attempt once there is a route, or a Stop.

        Args:
            history: which workers it keeps away from, and whether it wants them for itself.
        """
        num_given_back = sum(waiting.request.epoch > 0 for waiting in self._waiting)
        self._waiting.insert(num_given_back if request.epoch > 0 else len(self), _Waiting(request, inbox, history))
        self.pump()

    def withdraw(self, inbox: Inbox) -> None:
        """Let the request of this inbox wait no more; another one is left alone."""
        for waiting in self._waiting:
            if waiting.inbox is inbox:
                self._waiting.remove(waiting)
                return

    def pump(self) -> None:
        """Give routes to the head for as long as there are any; called when a worker came, went or has less to do.

        A request that no living path is wide enough for does not hold up those behind it. Where there is no path at
        all, requests wait for one to come back, but not for long.
        """
        if self._membership.serving:
            self._absence.end()
        else:
            self._absence.begin()
            if self._absence.long:
                self._end_all()
        members = self._membership.members
        widest = self._membership.max_context()
        passed_over: list[_Waiting] = []
        while self._waiting:
            request, inbox, history = self._waiting[0]
            route = self._router.choose(request, members, history.avoid)
            if route is None and total_tokens(request) <= widest:
                break
            if route is not None and history.alone and any(member.num_unproven for member in route.members):
                # Nobody else is given a route meanwhile, so that these come to an end.
                break
            waiting = self._waiting.popleft()
            if route is None:
                passed_over.append(waiting)
            else:
                inbox.assign(Attempt(request, route, alone=history.alone))
        self._waiting.extendleft(reversed(passed_over))

    def close(self) -> None:
        """Take back the timer; nobody waits any more."""
        self._absence.end()

    def _end_all(self) -> None:
        missing = self._membership.missing()
        for waiting in self._waiting:
            waiting.inbox.stop(NoWorkers(f"no_worker_grace_s: for {self._no_worker_grace_s:g} s {missing}"))


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
