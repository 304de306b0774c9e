"""Which FFN worker holds which experts: by load, with few moves, within everyone's capacity. Arithmetic only.

What is balanced is a *group*: the experts of one sparse layer, or all dense layers together (each is one expert, so
they are shared out among the workers layer by layer). Every expert first keeps its copies, as far as it needs them,
and gets those that it lacks where its group's load is least; then copies go from the worker with most of a group's
load to those with least. An expert that is too hot for any one worker gets more copies than others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain

from anabranch.errors import ConfigError
from anabranch.parallel.expert_group import ExpertGroup, Item, Placer, Room


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
    before = [current.get(name, ()) if current else () for name in names]
    limits = [capacities[name] for name in names]
    groups = _owned(layers, limits, before, loads, num_copies, ExpertGroup.share) or _owned(
        layers, limits, before, loads, num_copies, ExpertGroup.pack
    )
    if not groups:
        raise _too_little(layers, capacities, num_copies)
    for group in groups:
        measured = loads is not None and group.sparse
        if measured:
            group.keep()
        group.balance(may_copy=measured)
        if measured:
            group.trim(num_copies)
    return {
        name: _holding([item for group in groups for item in group.held(node)], len(layers))
        for node, name in enumerate(names)
    }


def imbalance(holdings: Collection[Sequence[Sequence[int]]], loads: Sequence[Sequence[float]]) -> float:
    """How many times the mean the busiest worker computes, in the average sparse layer; at least 1.

    An expert's copies share its rows. Layers weigh as much as they have rows, and each has a busiest worker of its own,
    since one layer is computed after the other.

    Args:
        holdings: of each worker, for each layer, the experts that it holds.
        loads: per layer and expert, rows in some span of time.
    """
    busiest = mean = 0.0
    for layer, rows in enumerate(loads):
        if len(rows) < 2 or not holdings:
            continue
        held = [holding[layer] for holding in holdings]
        copies = Counter(chain.from_iterable(held))
        by_node = [sum(rows[expert] / copies[expert] for expert in experts) for experts in held]
        busiest += max(by_node)
        mean += sum(by_node) / len(by_node)
    return busiest / mean if mean else 1.0


def _owned(
    layers: Sequence[tuple[int, int]],
    capacities: Sequence[int],
    before: Sequence[Sequence[Sequence[int]]],
    loads: Sequence[Sequence[float]] | None,
    num_copies: int,
    placer: Placer,
) -> list[ExpertGroup]:
    """All groups with enough copies of everything; none where they do not fit."""
    groups = _groups(layers, Room(capacities), before, loads)
    return groups if all(placer(group, num_copies) for group in groups) else []


def _groups(
    layers: Sequence[tuple[int, int]],
    room: Room,
    before: Sequence[Sequence[Sequence[int]]],
    loads: Sequence[Sequence[float]] | None,
) -> list[ExpertGroup]:
    """The largest experts first: they are the hardest to find room for."""
    dense: dict[int, list[Item]] = {}
    parts: list[tuple[list[Item], int, bool]] = []
    for layer, (num_experts, num_bytes) in enumerate(layers):
        if num_experts == 1:
            dense.setdefault(num_bytes, []).append((layer, 0))
        else:
            parts.append(([(layer, expert) for expert in range(num_experts)], num_bytes, True))
    parts += [(items, num_bytes, False) for num_bytes, items in dense.items()]
    return [
        ExpertGroup(
            items,
            num_bytes=num_bytes,
            loads=[1.0 if loads is None else max(0.0, loads[layer][expert]) for layer, expert in items],
            before=[_held_before(items, holding, sparse) for holding in before],
            room=room,
            sparse=sparse,
        )
        for items, num_bytes, sparse in sorted(parts, key=lambda part: -part[1])
    ]


def _held_before(items: Sequence[Item], holding: Sequence[Sequence[int]], sparse: bool) -> set[int]:
    """Places among `items` of those that a worker holds; it may have held those of another model."""
    if sparse:
        layer = items[0][0]
        return {expert for expert in holding[layer] if expert < len(items)} if layer < len(holding) else set()
    return {place for place, (layer, _) in enumerate(items) if layer < len(holding) and 0 in holding[layer]}


def _holding(items: Iterable[Item], num_layers: int) -> tuple[tuple[int, ...], ...]:
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
