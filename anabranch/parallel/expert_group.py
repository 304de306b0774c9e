"""Experts whose load is balanced together: a placement of them in the making. Arithmetic only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

Item = tuple[int, int]
"""(layer, expert)"""

# A measured load is never even for long: what is within this of the mean is left as it is.
TOLERANCE = 1.1


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

    Args:
        num_bytes: of one expert.
        loads: of each expert, in all its copies together.
        before: of each worker, what it holds now.
        sparse: whether these are experts of one layer.

    Attributes:
        held: of each worker, what it shall hold.
    """

    def __init__(
        self,
        *,
        num_bytes: int,
        loads: Mapping[Item, float],
        before: Sequence[set[Item]],
        room: Room,
        sparse: bool,
    ) -> None:
        self.num_bytes = num_bytes
        self.sparse = sparse
        self.held: list[set[Item]] = [set() for _ in before]
        self._loads = loads
        self._before = [{item for item in items if item in loads} for items in before]
        self._room = room
        self._holders: dict[Item, set[int]] = {item: set() for item in loads}
        self._load = [0.0] * len(before)

    # First, enough copies of everything -------------------------------------------------------------------

    def share(self, num_copies: int) -> bool:
        """Give every expert its copies, where it has them already and else where the load is least; False: no room."""
        hottest_first = sorted(self._loads, key=lambda item: (-self._loads[item], item))
        # What an expert will weigh at each holder once it has all its copies.
        load = [0.0] * len(self.held)

        def give(item: Item, nodes: Iterator[int]) -> bool:
            node = min(nodes, key=lambda node: (load[node], self._room.used[node], node), default=None)
            if node is not None:
                self._add(item, node)
                load[node] += self._loads[item] / num_copies
            return node is not None

        for item in hottest_first:
            while len(self._holders[item]) < num_copies:
                if not give(item, (node for node in self._with_room(item) if item in self._before[node])):
                    break
        for item in hottest_first:
            while len(self._holders[item]) < num_copies:
                if not give(item, self._with_room(item)):
                    return False
        return True

    def pack(self, num_copies: int) -> bool:
        """The same with an eye to room alone: each copy goes where most is left. False: it does not fit."""
        room = self._room
        for item in sorted(self._loads):
            for _ in range(num_copies):
                nodes = self._with_room(item)
                node = min(nodes, key=lambda node: (-room.left(node), room.used[node], node), default=None)
                if node is None:
                    return False
                self._add(item, node)
        return True

    def keep(self) -> None:
        """Leave further copies where they are, while there is room."""
        for node, items in enumerate(self._before):
            for item in sorted(items):
                if self._fits(item, node):
                    self._add(item, node)

    # Then, an even load -----------------------------------------------------------------------------------

    def balance(self, *, may_copy: bool) -> None:
        """Take load from the worker with most of it until it is even, or nothing helps.

        Args:
            may_copy: whether experts may get more copies; loads are measured then, and need not be quite even.
        """
        mean = sum(self._loads.values()) / len(self.held)
        limit = mean * (TOLERANCE if may_copy else 1.0)
        for _ in range(2 * len(self.held) * len(self._loads)):
            hot = max(range(len(self._load)), key=lambda node: (self._load[node], node))
            if self._load[hot] <= limit:
                return
            copies_first = may_copy and any(self._share(item) > mean for item in self.held[hot])
            if not (
                (copies_first and self._copy(hot))
                or self._move(hot)
                or self._swap(hot)
                or (may_copy and self._copy(hot))
            ):
                return

    def trim(self, num_copies: int) -> None:
        """Take back copies beyond `num_copies` that an even load does not need, the coldest first."""
        mean = sum(self._loads.values()) / len(self.held)
        for item in sorted(self._loads, key=lambda item: (self._loads[item], item)):
            for node in sorted(self._holders[item], key=lambda node: (-self._load[node], node)):
                if len(self._holders[item]) <= num_copies:
                    break
                limit = max(TOLERANCE * mean, *self._load)
                self._remove(item, node)
                if max(self._load) > limit:
                    self._add(item, node)

    def _move(self, hot: int) -> bool:
        """Move the copy whose move evens most."""
        best: tuple[float, Item, int] | None = None
        for node in self._cooler(hot):
            for item in sorted(self.held[hot]):
                share = self._share(item)
                after = max(self._load[hot] - share, self._load[node] + share)
                if after < _less(self._load[hot]) and (best is None or after < best[0]) and self._fits(item, node):
                    best = after, item, node
        if best is None:
            return False
        _, item, node = best
        self._remove(item, hot)
        self._add(item, node)
        return True

    def _swap(self, hot: int) -> bool:
        """Exchange the two copies whose exchange evens most; they have one size."""
        best: tuple[float, Item, Item, int] | None = None
        for node in self._cooler(hot):
            theirs = [(self._share(item), item) for item in sorted(self.held[node] - self.held[hot])]
            for item in sorted(self.held[hot] - self.held[node]):
                share = self._share(item)
                for other_share, other in theirs:
                    gain = share - other_share
                    after = max(self._load[hot] - gain, self._load[node] + gain)
                    if after < _less(self._load[hot]) and (best is None or after < best[0]):
                        best = after, item, other, node
        if best is None:
            return False
        _, item, other, node = best
        self._remove(item, hot)
        self._remove(other, node)
        self._add(item, node)
        self._add(other, hot)
        return True

    def _copy(self, hot: int) -> bool:
        """Give the expert that is hottest there one more copy, if possible where it is already."""
        for item in sorted(self.held[hot], key=lambda item: (-self._share(item), item)):
            share = self._loads[item] / (len(self._holders[item]) + 1)
            there = [
                node
                for node in self._cooler(hot)
                if self._fits(item, node) and self._load[node] + share < _less(self._load[hot])
            ]
            if there:
                self._add(item, min(there, key=lambda node: (item not in self._before[node], self._load[node], node)))
                return True
        return False

    # Parts ------------------------------------------------------------------------------------------------

    def _cooler(self, hot: int) -> Iterator[int]:
        return (node for node, load in enumerate(self._load) if load < self._load[hot])

    def _with_room(self, item: Item) -> Iterator[int]:
        return (node for node in range(len(self.held)) if self._fits(item, node))

    def _fits(self, item: Item, node: int) -> bool:
        return item not in self.held[node] and self.num_bytes <= self._room.left(node)

    def _share(self, item: Item) -> float:
        """Load of one copy."""
        return self._loads[item] / len(self._holders[item])

    def _add(self, item: Item, node: int) -> None:
        self._change(item, self._holders[item] | {node})
        self.held[node].add(item)
        self._room.used[node] += self.num_bytes

    def _remove(self, item: Item, node: int) -> None:
        self._change(item, self._holders[item] - {node})
        self.held[node].remove(item)
        self._room.used[node] -= self.num_bytes

    def _change(self, item: Item, holders: set[int]) -> None:
        for nodes, sign in ((self._holders[item], -1.0), (holders, 1.0)):
            for node in nodes:
                self._load[node] += sign * self._loads[item] / len(nodes)
        self._holders[item] = holders


def _less(load: float) -> float:
    """What must be undercut for a change to be worth it; more than the sums' rounding."""
    return load * (1 - 1e-9)


Placer = Callable[[ExpertGroup, int], bool]
"""`ExpertGroup.share` or `pack`."""
