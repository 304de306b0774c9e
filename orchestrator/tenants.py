"""What each tenant has been served, as the virtual token counter counts it.

Source: Sheng et al., Fairness in Serving Large Language Models (OSDI 2024), section 4: each tenant has a counter of
tokens served over its weight; who waits and has the least is next. A tenant that comes back after a pause is lifted to
the least of those who wait: what it did not ask for is not owed to it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

# Of tenants without a request; those with one are bounded by the number of requests.
MAX_IDLE = 1024


class Account:
    """One tenant, from its first request on until it is forgotten.

    Attributes:
        counter: tokens served, over the weight; never falls.
        num_waiting: its requests in the queue.
        num_open: its requests that have not ended.
    """

    __slots__ = ("counter", "listed", "name", "num_open", "num_waiting", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.counter = 0.0
        self.num_waiting = 0
        self.num_open = 0
        # Whether the list of those who wait has it.
        self.listed = False

    def charge(self, num_tokens: int) -> None:
        """The tenant was served so many tokens, of a prompt or an answer."""
        self.counter += num_tokens / self.weight


class Tenants:
    """All tenants that are known.

    Args:
        weights: of tenants that have another weight than 1.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._accounts: dict[str, Account] = {}
        self._num_idle = 0
        # Those who wait by counter, least first. Counters only grow: an entry that is too small is mended at the top.
        self._least: list[tuple[float, int, Account]] = []
        self._num_entries = 0
        self._num_waiting = 0
        # Who waited last, when nobody waits any more.
        self._last: Account | None = None

    def __len__(self) -> int:
        return len(self._accounts)

    def weight_of(self, name: str) -> float:
        return self._weights.get(name, 1.0)

    def find(self, name: str) -> Account | None:
        """The account of a tenant that is known."""
        return self._accounts.get(name)

    def open(self, name: str) -> Account:
        """The account of a tenant that has one more request; to be closed once that has ended."""
        account = self._accounts.get(name)
        if account is None:
            account = self._accounts[name] = Account(name, self.weight_of(name))
        elif account.num_open == 0:
            self._num_idle -= 1
        account.num_open += 1
        return account

    def close(self, account: Account) -> None:
        """A request has ended."""
        account.num_open -= 1
        if account.num_open == 0:
            self._num_idle += 1
            if self._num_idle > MAX_IDLE:
                self._forget()

    def wait(self, account: Account) -> None:
        """One more request of the tenant waits."""
        if account.num_waiting == 0:
            account.counter = max(account.counter, self._floor())
            self._num_waiting += 1
            if not account.listed:
                account.listed = True
                self._num_entries += 1
                heapq.heappush(self._least, (account.counter, self._num_entries, account))
                self._tidy()
        account.num_waiting += 1

    def leave(self, account: Account) -> None:
        """One of its requests waits no more."""
        account.num_waiting -= 1
        if account.num_waiting == 0:
            self._num_waiting -= 1
            self._last = account

    def _floor(self) -> float:
        """The least counter of those who wait, or of who did last."""
        while self._num_waiting:
            counter, number, account = self._least[0]
            if account.num_waiting == 0:
                heapq.heappop(self._least)
                account.listed = False
            elif counter < account.counter:
                heapq.heapreplace(self._least, (account.counter, number, account))
            else:
                return counter
        return 0.0 if self._last is None else self._last.counter

    def _tidy(self) -> None:
        """Entries of those who wait no more go when they come to the top; before they are too many, all go."""
        if len(self._least) > 2 * self._num_waiting + MAX_IDLE:
            for _, _, account in self._least:
                account.listed = account.num_waiting > 0
            self._least = [entry for entry in self._least if entry[2].listed]
            heapq.heapify(self._least)

    def _forget(self) -> None:
        """Forget half of the idle tenants, those with the least counters.

        Whoever has no more than the floor would be lifted to it in any case, and nothing is lost with it.
        """
        idle = sorted((a for a in self._accounts.values() if a.num_open == 0), key=lambda account: account.counter)
        for account in idle[: max(1, len(idle) // 2)]:
            del self._accounts[account.name]
            self._num_idle -= 1
