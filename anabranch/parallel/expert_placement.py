"""Which FFN worker holds which experts: by load, with few moves, within everyone's capacity. Arithmetic only.

What is balanced is a *group*: the experts of one sparse layer, or all dense layers together (each is one expert, so
they are shared out among the workers layer by layer). Every expert first keeps its copies, as far as it needs them,
and gets those that it lacks where its group's load is least; then copies go from the worker with most of a group's
load to those with least. An expert that is too hot for any one worker gets more copies than others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from anabranch.errors import ConfigError

Item = tuple[int, int]
"""(layer, expert)"""

# A measured load is never even for long: what is within this of the mean is left as it is.
TOLERANCE = 1.1


def place(
    layers: Sequence[tuple[int, int]],
    capacities: Mapping[str, int],
    *,
    replicas: int,
    current: Mapping[str, Sequence[Sequence[int]]] | None = None,
    loads: Sequence[Sequence[float]] | None = None,
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """For each worker, and for each layer, the experts that it shall hold, ascending.

    Args:
        layers: per layer, the number of experts and the bytes of one; a dense layer is one expert.
        capacities: worker -> most bytes; 0: no limit.
        replicas: workers that hold each expert; 0: all of them.
        current: what workers hold now; nothing else has to be loaded. Workers that are gone are no matter.
        loads: per layer and expert, rows in some span of time; then hot experts get more copies than `replicas` where
            there is room. None: not measured; all are taken to be alike, and none gets more.

    Raises:
        ConfigError: there is no worker, fewer than `replicas`, or too little capacity.
    """
    _check(layers, capacities, replicas)
    names = sorted(capacities)
    num_copies = replicas or len(names)
    before = [_items(current.get(name, ()) if current else (), layers) for name in names]
    groups = _groups(layers, loads)
    sharing = _Sharing([capacities[name] for name in names], before)
    if not sharing.share(groups, num_copies):
        sharing = _Sharing([capacities[name] for name in names], before)
        if not sharing.pack(groups, num_copies):
            raise _too_little(layers, capacities, num_copies)
    for group in groups:
        sharing.balance(group, may_copy=loads is not None and group.sparse)
    return {name: _holding(held, len(layers)) for name, held in zip(names, sharing.held, strict=True)}


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Experts of one size whose load is balanced together.

    Attributes:
        loads: of each expert, in all its copies together.
    """

    num_bytes: int
    loads: dict[Item, float]
    sparse: bool

    def of(self, items: Iterable[Item]) -> list[Item]:
        """Those that belong to it."""
        return sorted(item for item in items if item in self.loads)


@dataclass
class _Sharing:
    """A placement in the making.

    Args:
        capacities: of each worker, in bytes; 0: no limit.
        before: what each worker holds now.
    """

    capacities: list[int]
    before: list[set[Item]]
    held: list[set[Item]] = field(init=False)
    used: list[int] = field(init=False)
    holders: dict[Item, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.held = [set() for _ in self.capacities]
        self.used = [0] * len(self.capacities)

    # First, enough copies of everything -------------------------------------------------------------------

    def share(self, groups: Sequence[_Group], num_copies: int) -> bool:
        """Give every expert its copies, where it has them already and else where the load is least; False: no room."""
        for group in groups:
            load = [0.0] * len(self.held)
            for item in _hottest(group):
                share = group.loads[item] / num_copies
                for node in sorted(self._holders_before(item), key=lambda node: (load[node], self.used[node], node)):
                    if len(self.holders.get(item, ())) < num_copies and self._fits(group, item, node):
                        self._add(group, item, node)
                        load[node] += share
            for item in _hottest(group):
                while len(self.holders.get(item, ())) < num_copies:
                    node = self._best(group, item, lambda node, load=load: (load[node], self.used[node], node))
                    if node is None:
                        return False
                    self._add(group, item, node)
                    load[node] += group.loads[item] / num_copies
        return True

    def pack(self, groups: Sequence[_Group], num_copies: int) -> bool:
        """The same with an eye to room alone: each copy goes where most is left. False: it does not fit."""
        for group in sorted(groups, key=lambda group: -group.num_bytes):
            for item in sorted(group.loads):
                for _ in range(num_copies):
                    node = self._best(group, item, lambda node: (-self._room(node), self.used[node], node))
                    if node is None:
                        return False
                    self._add(group, item, node)
        return True

    # Then, an even load -----------------------------------------------------------------------------------

    def balance(self, group: _Group, *, may_copy: bool) -> None:
        """Take load from the worker with most of it until it is even, or nothing helps."""
        tolerance = TOLERANCE if may_copy else 1.0
        for _ in range(2 * len(self.held) * len(group.loads)):
            load = self._load(group)
            hot = max(range(len(load)), key=lambda node: (load[node], node))
            mean = sum(load) / len(load)
            if load[hot] <= tolerance * mean:
                return
            too_hot = any(self._share(group, item) > mean for item in group.of(self.held[hot]))
            copied = may_copy and too_hot and self._copy(group, hot, load)
            if copied or self._move(group, hot, load) or self._swap(group, hot, load):
                continue
            if not (may_copy and self._copy(group, hot, load)):
                return

    def _move(self, group: _Group, hot: int, load: list[float]) -> bool:
        """Move the copy whose move evens most."""
        best: tuple[float, Item, int] | None = None
        for item in group.of(self.held[hot]):
            share = self._share(group, item)
            for node in self._others(hot, load):
                after = max(load[hot] - share, load[node] + share)
                if self._fits(group, item, node) and after < _less(load[hot]) and (best is None or after < best[0]):
                    best = after, item, node
        if best is None:
            return False
        self._remove(group, best[1], hot)
        self._add(group, best[1], best[2])
        return True

    def _swap(self, group: _Group, hot: int, load: list[float]) -> bool:
        """Exchange two copies, of one size, so as to even most."""
        best: tuple[float, Item, Item, int] | None = None
        for node in self._others(hot, load):
            theirs = [item for item in group.of(self.held[node]) if item not in self.held[hot]]
            for item in group.of(self.held[hot]):
                if item in self.held[node]:
                    continue
                for other in theirs:
                    gain = self._share(group, item) - self._share(group, other)
                    after = max(load[hot] - gain, load[node] + gain)
                    if after < _less(load[hot]) and (best is None or after < best[0]):
                        best = after, item, other, node
        if best is None:
            return False
        _, item, other, node = best
        self._remove(group, item, hot)
        self._remove(group, other, node)
        self._add(group, item, node)
        self._add(group, other, hot)
        return True

    def _copy(self, group: _Group, hot: int, load: list[float]) -> bool:
        """Give the expert that is hottest there one more copy, if possible where it is already."""
        for item in sorted(group.of(self.held[hot]), key=lambda item: (-self._share(group, item), item)):
            share = group.loads[item] / (len(self.holders[item]) + 1)
            there = [
                node
                for node in self._others(hot, load)
                if self._fits(group, item, node) and load[node] + share < _less(load[hot])
            ]
            if there:
                self._add(group, item, min(there, key=lambda node: (item not in self.before[node], load[node], node)))
                return True
        return False

    # Parts ------------------------------------------------------------------------------------------------

    def _holders_before(self, item: Item) -> list[int]:
        return [node for node, items in enumerate(self.before) if item in items]

    def _others(self, hot: int, load: list[float]) -> Iterator[int]:
        return (node for node in range(len(load)) if node != hot and load[node] < load[hot])

    def _best(self, group: _Group, item: Item, key: Callable[[int], tuple[float, ...]]) -> int | None:
        """The worker with the least key that has room for a copy."""
        return min((node for node in range(len(self.held)) if self._fits(group, item, node)), key=key, default=None)

    def _fits(self, group: _Group, item: Item, node: int) -> bool:
        return item not in self.held[node] and group.num_bytes <= self._room(node)

    def _room(self, node: int) -> float:
        return self.capacities[node] - self.used[node] if self.capacities[node] else float("inf")

    def _share(self, group: _Group, item: Item) -> float:
        """Load of one copy."""
        return group.loads[item] / len(self.holders[item])

    def _load(self, group: _Group) -> list[float]:
        return [sum(self._share(group, item) for item in group.of(items)) for items in self.held]

    def _add(self, group: _Group, item: Item, node: int) -> None:
        self.held[node].add(item)
        self.used[node] += group.num_bytes
        self.holders.setdefault(item, set()).add(node)

    def _remove(self, group: _Group, item: Item, node: int) -> None:
        self.held[node].remove(item)
        self.used[node] -= group.num_bytes
        self.holders[item].remove(node)


def _groups(layers: Sequence[tuple[int, int]], loads: Sequence[Sequence[float]] | None) -> list[_Group]:
    """The largest experts first: they are the hardest to find room for."""
    dense: dict[int, dict[Item, float]] = {}
    groups: list[_Group] = []
    for layer, (num_experts, num_bytes) in enumerate(layers):
        items = {
            (layer, expert): 1.0 if loads is None else max(0.0, loads[layer][expert]) for expert in range(num_experts)
        }
        if num_experts == 1:
            dense.setdefault(num_bytes, {}).update(items)
        else:
            groups.append(_Group(num_bytes=num_bytes, loads=items, sparse=True))
    groups += [_Group(num_bytes=num_bytes, loads=items, sparse=False) for num_bytes, items in dense.items()]
    return sorted(groups, key=lambda group: -group.num_bytes)


def _hottest(group: _Group) -> list[Item]:
    return sorted(group.loads, key=lambda item: (-group.loads[item], item))


def _less(load: float) -> float:
    """What must be undercut for a change to be worth it; more than the sums' rounding."""
    return load * (1 - 1e-9)


def _items(holding: Sequence[Sequence[int]], layers: Sequence[tuple[int, int]]) -> set[Item]:
    return {
        (layer, expert)
        for layer, (experts, (num_experts, _)) in enumerate(zip(holding, layers, strict=False))
        for expert in experts
        if expert < num_experts
    }


def _holding(items: set[Item], num_layers: int) -> tuple[tuple[int, ...], ...]:
    experts: list[list[int]] = [[] for _ in range(num_layers)]
    for layer, expert in sorted(items):
        experts[layer].append(expert)
    return tuple(map(tuple, experts))


def _check(layers: Sequence[tuple[int, int]], capacities: Mapping[str, int], replicas: int) -> None:
    if not capacities:
        raise ConfigError("ffn.workers", 0, "no ffn worker is there to hold experts; start at least one")
    if replicas > len(capacities):
        raise ConfigError(
            "replicas",
            replicas,
            f"must be at most the number of ffn workers ({len(capacities)}); 0: all hold each expert",
        )
    largest = max((num_bytes for _, num_bytes in layers), default=0)
    if all(0 < capacity < largest for capacity in capacities.values()):
        raise _too_little(layers, capacities, replicas or len(capacities))


def _too_little(layers: Sequence[tuple[int, int]], capacities: Mapping[str, int], num_copies: int) -> ConfigError:
    needed = num_copies * sum(num_experts * num_bytes for num_experts, num_bytes in layers)
    num_experts = sum(count for count, _ in layers)
    largest = max((num_bytes for _, num_bytes in layers), default=0)
    there = ", ".join(f"{name} {capacity or 'no limit'}" for name, capacity in sorted(capacities.items()))
    return ConfigError(
        "capacity",
        sum(capacities.values()),
        f"bytes are too few for {num_experts} experts of at most {largest} bytes, {num_copies} of each on workers of "
        f"their own ({needed} bytes; {there}); raise capacity, lower replicas, or add ffn workers",
    )
