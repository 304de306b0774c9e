"""A bound that tenants share, so that one of them cannot fill the room for all.

A tenant may fill its share of the bound, by weight among those that want room, or as much as is left free, whichever
is more (as dynamic thresholds of switches do: Choudhury and Hahne, 1998). So one alone has all, a burst finds room
while others want little, and who comes to a full room gets its share as places come free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

# A tenant that was refused is counted among those that want room for so long.
WANTS_S = 10.0
MAX_REFUSED = 1024


class Wanting:
    """Tenants that want room: those that have some, and those that were refused lately."""

    def __init__(self, weight_of: Callable[[str], float]) -> None:
        self._weight_of = weight_of
        self._num_places: dict[str, int] = {}
        self._refused: OrderedDict[str, float] = OrderedDict()
        # Of all of them.
        self._weight = 0.0

    def came(self, tenant: str) -> None:
        self._count(tenant)
        self._num_places[tenant] = self._num_places.get(tenant, 0) + 1

    def left(self, tenant: str) -> None:
        self._num_places[tenant] -= 1
        if not self._num_places[tenant]:
            del self._num_places[tenant]
            self._discount(tenant)

    def refused(self, tenant: str, now_s: float) -> None:
        self._count(tenant)
        self._refused[tenant] = now_s
        self._refused.move_to_end(tenant)
        if len(self._refused) > MAX_REFUSED:
            self._forget_oldest()

    def share_of(self, tenant: str, now_s: float) -> float:
        """The tenant's part of any bound, 0 to 1."""
        while self._refused and now_s - next(iter(self._refused.values())) > WANTS_S:
            self._forget_oldest()
        own = self._weight_of(tenant)
        return own / (self._weight if self._wants(tenant) else self._weight + own)

    def _wants(self, tenant: str) -> bool:
        return tenant in self._num_places or tenant in self._refused

    def _count(self, tenant: str) -> None:
        if not self._wants(tenant):
            self._weight += self._weight_of(tenant)

    def _discount(self, tenant: str) -> None:
        if not self._wants(tenant):
            self._weight -= self._weight_of(tenant)

    def _forget_oldest(self) -> None:
        tenant, _ = self._refused.popitem(last=False)
        self._discount(tenant)


class SharedBound:
    """Counts units of one kind.

    Args:
        most: of all together.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.num = 0
        self._by_tenant: dict[str, int] = {}

    def of(self, tenant: str) -> int:
        return self._by_tenant.get(tenant, 0)

    def add(self, tenant: str, num: int) -> None:
        """Count so many more, or less where `num` is negative."""
        self.num += num
        left = self.of(tenant) + num
        if left:
            self._by_tenant[tenant] = left
        else:
            self._by_tenant.pop(tenant, None)

    def is_full(self, num: int) -> bool:
        """Whether there is no room for so many more."""
        return self.num + num > self.most

    def is_beyond_share(self, tenant: str, num: int, share_of: Callable[[], float]) -> bool:
        """Whether so many more are too many for one tenant; one unit is not, while there is room.

        Args:
            share_of: asked only where it matters.
        """
        wanted = self.of(tenant) + num
        free = self.most - self.num
        return wanted > free and self.of(tenant) > 0 and wanted > max(1.0, self.most * share_of())
