"""Experts whose load is balanced together: a placement of them in the making. Arithmetic only."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Sequence

Item = tuple[int, int]
"""(layer, expert)"""

# A measured load is never even for long: what is within this of the mean is left as it is.
TOLERANCE = 1.1
# What a change must at least win, of the load that it is to lower; more than the sums' rounding.
_GAIN = 1e-9


class Room:
    """What is left of each worker's capacity, for all groups.

    Args:
        capacities: in bytes; 0: no limit.
    """

    def __init__(self, capacities: Sequence[int]) -> None:
        self._capacities = list(capacities)
        self.used = [0] * len(capacities)

    def left(self, node: int) -> float:
        capacity = self._capacities[node]
        return capacity - self.used[node] if capacity else float("inf")


class ExpertGroup:
    """The experts of one sparse layer, or all dense layers of one size.

    In here an expert is its place in `items`, and a worker its number.

    Args:
        items: ascending.
        num_bytes: of one expert.
        loads: of each expert, in all its copies together.
        before: of each worker, which of `items` it holds now.
        sparse: whether these are experts of one layer.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        num_bytes: int,
        loads: Sequence[float],
        before: Sequence[set[int]],
        room: Room,
        sparse: bool,
    ) -> None:
        self.items = items
        self.num_bytes = num_bytes
        self.sparse = sparse
        self._loads = loads
        self._mean = sum(loads) / len(before)
        self._before = before
        self._room = room
        self._held: list[set[int]] = [set() for _ in before]
        self._holders: list[tuple[int, ...]] = [()] * len(items)
        self._load = [0.0] * len(before)

    def held(self, node: int) -> list[Item]:
        """What a worker shall hold, ascending."""
        return [self.items[item] for item in sorted(self._held[node])]

    # First, enough copies of everything -------------------------------------------------------------------

    def share(self, num_copies: int) -> bool:
        """Give every expert its copies, where it has them already and else where the load is least; False: no room."""
        loads, held, used, load = self._loads, self._held, self._room.used, self._load
        hottest_first = sorted(range(len(self.items)), key=lambda item: (-loads[item], item))
        holders: list[list[int]] = [[] for _ in self.items]

        def give(item: int, node: int) -> None:
            holders[item].append(node)
            held[node].add(item)
            used[node] += self.num_bytes
            load[node] += loads[item] / num_copies

        there: list[list[int]] = [[] for _ in self.items]
        for node, items in enumerate(self._before):
            for item in items:
                there[item].append(node)
        for item in hottest_first:
            nodes = there[item]
            while nodes and len(holders[item]) < num_copies:
                node = min(nodes, key=lambda node: (load[node], used[node], node)) if len(nodes) > 1 else nodes[0]
                nodes.remove(node)
                if self._fits(item, node):
                    give(item, node)
        coolest_first = [(load[node], used[node], node) for node in range(len(load))]
        heapq.heapify(coolest_first)
        for item in hottest_first:
            passed: list[tuple[float, int, int]] = []
            while len(holders[item]) < num_copies:
                if not coolest_first:
                    return False
                *_, node = first = heapq.heappop(coolest_first)
                if item in held[node]:
                    passed.append(first)
                elif self._fits(item, node):
                    give(item, node)
                    passed.append((load[node], used[node], node))
                # Where one of these has no room, none has from now on.
            for entry in passed:
                heapq.heappush(coolest_first, entry)
        self._holders = [tuple(nodes) for nodes in holders]
        return True

    def pack(self, num_copies: int) -> bool:
        """The same with an eye to room alone: each copy goes where most is left. False: it does not fit."""
        room = self._room
        for item in range(len(self.items)):
            for _ in range(num_copies):
                nodes = (node for node in range(len(self._held)) if self._fits(item, node))
                node = min(nodes, key=lambda node: (-room.left(node), room.used[node], node), default=None)
                if node is None:
                    return False
                self._add(item, node)
        return True

    def keep(self) -> None:
        """Leave further copies where they are, while there is room."""
        for node, items in enumerate(self._before):
            for item in sorted(items - self._held[node]):
                if self._fits(item, node):
                    self._add(item, node)

    # Then, an even load -----------------------------------------------------------------------------------

    def balance(self, *, may_copy: bool) -> None:
        """Take load from the worker with most of it until it is even, or nothing helps.

        Args:
            may_copy: whether experts may get more copies; loads are measured then, and need not be quite even.
        """
        mean, load = self._mean, self._load
        limit = mean * (TOLERANCE if may_copy else 1.0 + _GAIN)
        for _ in range(2 * len(load) * len(self.items)):
            most = max(load)
            if most <= limit:
                return
            hot = len(load) - 1 - load[::-1].index(most)
            copies_first = may_copy and any(self._share(item) > mean for item in self._held[hot])
            if not (
                (copies_first and self._copy(hot))
                or self._move(hot)
                or self._swap(hot)
                or (may_copy and self._copy(hot))
            ):
                return

    def trim(self, num_copies: int) -> None:
        """Take back copies beyond `num_copies` that an even load does not need, the coldest first."""
        many = (item for item, holders in enumerate(self._holders) if len(holders) > num_copies)
        for item in sorted(many, key=lambda item: (self._loads[item], item)):
            for node in sorted(self._holders[item], key=lambda node: (-self._load[node], node)):
                if len(self._holders[item]) <= num_copies:
                    break
                limit = max(TOLERANCE * self._mean, *self._load)
                self._remove(item, node)
                if max(self._load) > limit:
                    self._add(item, node)

    def _move(self, hot: int) -> bool:
        """Move the copy whose move evens most."""
        most, least = self._load[hot], self._load[hot] * (1 - _GAIN)
        by_share = self._by_share(self._held[hot])
        best: tuple[float, int, int] | None = None
        for load, node in self._coolest_first(hot):
            if (most + load) / 2 > (least if best is None else best[0]):
                break
            for share, items in by_share.items():
                after = max(most - share, load + share)
                if after < least and (best is None or after <= best[0]):
                    item = next((item for item in items if self._fits(item, node)), None)
                    if item is not None and (best is None or (after, node, item) < best):
                        best = after, node, item
        if best is None:
            return False
        _, node, item = best
        self._remove(item, hot)
        self._add(item, node)
        return True

    def _swap(self, hot: int) -> bool:
        """Exchange the two copies whose exchange evens most; they have one size."""
        most, least = self._load[hot], self._load[hot] * (1 - _GAIN)
        best: tuple[float, int, int, int] | None = None
        for load, node in self._coolest_first(hot):
            if (most + load) / 2 > (least if best is None else best[0]):
                break
            ours = self._by_share(self._held[hot] - self._held[node])
            theirs = self._by_share(self._held[node] - self._held[hot])
            shares = sorted(theirs)
            for share, (item, *_) in ours.items():
                # The nearest to the one with which both would have the same load.
                place = bisect_left(shares, share - (most - load) / 2)
                for other_share in shares[max(0, place - 1) : place + 1]:
                    gain = share - other_share
                    after = max(most - gain, load + gain)
                    change = after, node, item, theirs[other_share][0]
                    if after < least and (best is None or change < best):
                        best = change
        if best is None:
            return False
        _, node, item, other = best
        self._remove(item, hot)
        self._remove(other, node)
        self._add(item, node)
        self._add(other, hot)
        return True

    def _copy(self, hot: int) -> bool:
        """Give the expert that is hottest there one more copy, if possible where it is already."""
        least = self._load[hot] * (1 - _GAIN)
        for item in sorted(self._held[hot], key=lambda item: (-self._share(item), item)):
            share = self._loads[item] / (len(self._holders[item]) + 1)
            there = [
                node
                for node, load in enumerate(self._load)
                if load < self._load[hot] and load + share < least and self._fits(item, node)
            ]
            if there:
                self._add(item, min(there, key=lambda node: (item not in self._before[node], self._load[node], node)))
                return True
        return False

    # Parts ------------------------------------------------------------------------------------------------

    def _by_share(self, items: set[int]) -> dict[float, list[int]]:
        """Experts by the load of one copy; of those that are alike, the first comes first."""
        by_share: dict[float, list[int]] = {}
        for item in sorted(items):
            by_share.setdefault(self._share(item), []).append(item)
        return by_share

    def _coolest_first(self, hot: int) -> list[tuple[float, int]]:
        """(load, worker) of those with less than one; with which it can have their mean, at best."""
        most = self._load[hot]
        return sorted((load, node) for node, load in enumerate(self._load) if load < most)

    def _fits(self, item: int, node: int) -> bool:
        return item not in self._held[node] and self.num_bytes <= self._room.left(node)

    def _share(self, item: int) -> float:
        """Load of one copy."""
        return self._loads[item] / len(self._holders[item])

    def _add(self, item: int, node: int) -> None:
        self._change(item, (*self._holders[item], node))
        self._held[node].add(item)
        self._room.used[node] += self.num_bytes

    def _remove(self, item: int, node: int) -> None:
        self._change(item, tuple(other for other in self._holders[item] if other != node))
        self._held[node].remove(item)
        self._room.used[node] -= self.num_bytes

    def _change(self, item: int, holders: tuple[int, ...]) -> None:
        before, load, whole = self._holders[item], self._load, self._loads[item]
        for node in before:
            load[node] -= whole / len(before)
        for node in holders:
            load[node] += whole / len(holders)
        self._holders[item] = holders


Placer = Callable[[ExpertGroup, int], bool]
"""`ExpertGroup.share` or `pack`."""
