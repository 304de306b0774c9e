"""A bound that parties share (tenants, priorities), so that one of them cannot fill the room for all.

A party may fill its share of the bound, by weight among those that want room, or as much as is left free, whichever
is more (as dynamic thresholds of switches do: Choudhury and Hahne, 1998). So one alone has all, a burst finds room
while others want little, and who comes to a full room gets its share as places come free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

# A party that was refused is counted among those that want room for so long.
WANTS_S = 10.0
MAX_REFUSED = 1024


class Wanting(Generic[K]):
    """Parties that want room: those that have some, and those that were refused lately."""

    def __init__(self, weight_of: Callable[[K], float]) -> None:
        self._weight_of = weight_of
        self._num_places: dict[K, int] = {}
        self._refused: OrderedDict[K, float] = OrderedDict()
        # Of all of them.
        self._weight: float = 0

    def came(self, party: K) -> None:
        self._count(party)
        self._num_places[party] = self._num_places.get(party, 0) + 1

    def left(self, party: K) -> None:
        self._num_places[party] -= 1
        if not self._num_places[party]:
            del self._num_places[party]
            self._discount(party)

    def refused(self, party: K, now_s: float) -> None:
        self._count(party)
        self._refused[party] = now_s
        self._refused.move_to_end(party)
        if len(self._refused) > MAX_REFUSED:
            self._forget_oldest()

    def share_of(self, party: K, now_s: float) -> float:
        """The party's part of any bound, 0 to 1."""
        while self._refused and now_s - next(iter(self._refused.values())) > WANTS_S:
            self._forget_oldest()
        own = self._weight_of(party)
        return own / (self._weight if self._wants(party) else self._weight + own)

    def _wants(self, party: K) -> bool:
        return party in self._num_places or party in self._refused

    def _count(self, party: K) -> None:
        if not self._wants(party):
            self._weight += self._weight_of(party)

    def _discount(self, party: K) -> None:
        if not self._wants(party):
            self._weight -= self._weight_of(party)

    def _forget_oldest(self) -> None:
        party, _ = self._refused.popitem(last=False)
        self._discount(party)


class SharedBound(Generic[K]):
    """Counts units of one kind.

    Args:
        most: of all together.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.num = 0
        self._by_party: dict[K, int] = {}

    def of(self, party: K) -> int:
        return self._by_party.get(party, 0)

    def add(self, party: K, num: int) -> None:
        """Count so many more, or less where `num` is negative."""
        self.num += num
        left = self.of(party) + num
        if left:
            self._by_party[party] = left
        else:
            self._by_party.pop(party, None)

    def is_full(self, num: int) -> bool:
        """Whether there is no room for so many more."""
        return self.num + num > self.most

    def is_beyond_share(self, party: K, num: int, share_of: Callable[[], float]) -> bool:
        """Whether so many more are too many for one party; those of one that has none are not.

        Args:
            share_of: asked only where it matters.
        """
        wanted = self.of(party) + num
        free = self.most - self.num
        return wanted > free and self.of(party) > 0 and wanted > max(1.0, self.most * share_of())
