"""In what order those who wait are served: by priority, with ageing, and among equals by what their tenants have had.

    given back   requests that workers gave back go first, in order
    level        one for each priority that somebody waits with
      flow       one for each tenant in it, first come, first served

The head of a level is that of the tenant with the least counter (`Tenants`). The head of all is the level's head with
the least priority x `priority_step_s` + arrival: a step of priority weighs as much as so many seconds of waiting.
Whatever the number of those who wait, a step takes a time that depends on the number of levels alone, and on the
logarithm of the number of tenants.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Generic, TypeVar

from orchestrator.tenants import Account, Tenants

T = TypeVar("T")

# Levels are looked through one by one.
MIN_PRIORITY, MAX_PRIORITY = -100, 100


class Waiting(Generic[T]):
    """One who waits.

    Attributes:
        item: whatever it is.
        num_tokens: of its prompt.
        arrived_s: when it came.
    """

    __slots__ = ("account", "arrived_s", "flow", "item", "num_tokens", "number", "priority")

    def __init__(
        self, item: T, account: Account, priority: int, num_tokens: int, arrived_s: float, number: int
    ) -> None:
        self.item = item
        self.account = account
        self.priority = priority
        self.num_tokens = num_tokens
        self.arrived_s = arrived_s
        self.number = number
        # None: among those that were given back, or nowhere.
        self.flow: _Flow[T] | None = None


class _Flow(Generic[T]):
    def __init__(self, account: Account) -> None:
        self.account = account
        self.waiting: OrderedDict[int, Waiting[T]] = OrderedDict()
        self.num_tokens = 0

    @property
    def key(self) -> tuple[float, int]:
        """Counter, and who came first among equals."""
        return self.account.counter, next(iter(self.waiting))


class _Level(Generic[T]):
    """Flows of one priority; each has one entry in the heap, which is mended when it comes to the top."""

    def __init__(self) -> None:
        self.flows: dict[Account, _Flow[T]] = {}
        self.num_tokens = 0
        self.weight = 0.0
        self._heap: list[tuple[tuple[float, int], int, _Flow[T]]] = []

    def flow_of(self, account: Account) -> _Flow[T]:
        flow = self.flows.get(account)
        if flow is None:
            flow = self.flows[account] = _Flow(account)
            self.weight += account.weight
        return flow

    def listed(self, flow: _Flow[T]) -> None:
        """The flow, which was empty, is so no more."""
        heapq.heappush(self._heap, (flow.key, id(flow), flow))

    def emptied(self, flow: _Flow[T]) -> None:
        """Nobody waits in the flow any more."""
        del self.flows[flow.account]
        self.weight -= flow.account.weight
        # Entries of flows that are gone go when they come to the top; before they are too many, all go.
        if len(self._heap) > 2 * len(self.flows) + 16:
            self._heap = [(flow.key, id(flow), flow) for flow in self.flows.values()]
            heapq.heapify(self._heap)

    def head(self) -> Waiting[T]:
        while True:
            key, number, flow = self._heap[0]
            if not flow.waiting:
                heapq.heappop(self._heap)
            elif key < flow.key:
                heapq.heapreplace(self._heap, (flow.key, number, flow))
            else:
                return next(iter(flow.waiting.values()))


class FairOrder(Generic[T]):
    """See the module. Pure: it is told the time.

    Args:
        priority_step_s: waiting that makes up for one step of priority.
    """

    def __init__(self, tenants: Tenants, priority_step_s: float) -> None:
        self._tenants = tenants
        self._priority_step_s = priority_step_s
        self._given_back: OrderedDict[int, Waiting[T]] = OrderedDict()
        self._levels: dict[int, _Level[T]] = {}
        self._num_waiting = 0
        self._num_put = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._num_waiting

    def put(
        self, item: T, account: Account, priority: int, num_tokens: int, now_s: float, *, given_back: bool = False
    ) -> Waiting[T]:
        """Let an item wait.

        Args:
            given_back: it goes before all that was not.
        """
        self._num_put += 1
        waiting = Waiting(item, account, priority, num_tokens, now_s, self._num_put)
        self._enter(waiting, given_back=given_back)
        return waiting

    def put_back(self, waiting: Waiting[T], *, given_back: bool = False) -> None:
        """Let what was removed wait again, with the time that it has waited, and ahead of its equals."""
        self._enter(waiting, given_back=given_back)
        holder = self._given_back if waiting.flow is None else waiting.flow.waiting
        holder.move_to_end(waiting.number, last=False)

    def _enter(self, waiting: Waiting[T], *, given_back: bool) -> None:
        self._tenants.wait(waiting.account)
        self._num_waiting += 1
        self.num_tokens += waiting.num_tokens
        if given_back:
            waiting.flow = None
            self._given_back[waiting.number] = waiting
            return
        level = self._levels.get(waiting.priority)
        if level is None:
            level = self._levels[waiting.priority] = _Level()
        flow = waiting.flow = level.flow_of(waiting.account)
        flow.waiting[waiting.number] = waiting
        flow.num_tokens += waiting.num_tokens
        level.num_tokens += waiting.num_tokens
        if len(flow.waiting) == 1:
            level.listed(flow)

    def remove(self, waiting: Waiting[T]) -> None:
        """Let it wait no more, wherever it stands."""
        self._tenants.leave(waiting.account)
        self._num_waiting -= 1
        self.num_tokens -= waiting.num_tokens
        flow = waiting.flow
        if flow is None:
            del self._given_back[waiting.number]
            return
        waiting.flow = None
        level = self._levels[waiting.priority]
        del flow.waiting[waiting.number]
        flow.num_tokens -= waiting.num_tokens
        level.num_tokens -= waiting.num_tokens
        if not flow.waiting:
            level.emptied(flow)
            if not level.flows:
                del self._levels[waiting.priority]

    def head(self) -> Waiting[T] | None:
        """Who is served next; None where nobody waits."""
        if self._given_back:
            return next(iter(self._given_back.values()))
        return min((level.head() for level in self._levels.values()), key=self._rank, default=None)

    def _rank(self, waiting: Waiting[T]) -> tuple[float, int]:
        return waiting.priority * self._priority_step_s + waiting.arrived_s, waiting.number

    def tokens_ahead(self, account: Account | None, priority: int) -> float:
        """Prompt tokens that are served before one that comes now, if nobody else comes and counters are equal.

        All with a better priority, and of its equals as many as its tenant's share makes of those that its own tenant
        has there; never more than wait.
        """
        # Those that were given back are in no level.
        ahead = float(self.num_tokens - sum(level.num_tokens for level in self._levels.values()))
        for other, level in self._levels.items():
            if other < priority:
                ahead += level.num_tokens
            elif other == priority and account is not None:
                own = level.flows.get(account)
                if own is not None:
                    ahead += min(level.num_tokens, own.num_tokens * level.weight / account.weight)
        return ahead
