"""Which FFN node holds which experts: arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from anabranch.errors import ConfigError

Holding = tuple[tuple[int, ...], ...]


def place(
    layers: Sequence[tuple[int, int]], capacities: Mapping[str, int], *, replicas: int, current: Mapping[str, Holding]
) -> dict[str, Holding]:
    """Every expert on so many nodes, bytes spread evenly, what is there already left where it is while that is even.

    Args:
        layers: experts of each layer, and bytes of one of them.
        capacities: most bytes of each node, by name; 0: no limit.
        replicas: nodes that hold each expert; 0: all. Never more than there are.
        current: what each node holds now.

    Raises:
        ConfigError: `capacity`: an expert finds no room.
    """
    copies = min(replicas or len(capacities), len(capacities))
    held = {name: {(i, e) for i, experts in enumerate(holding) for e in experts} for name, holding in current.items()}
    used = dict.fromkeys(capacities, 0)
    chosen: dict[str, list[list[int]]] = {name: [[] for _ in layers] for name in capacities}
    for layer, (count, size) in enumerate(layers):
        for expert in range(count):
            room = [name for name, most in capacities.items() if not most or used[name] + size <= most]
            if len(room) < copies:
                needed = copies * sum(each * count for count, each in layers)
                raise ConfigError(
                    "capacity",
                    sum(capacities.values()),
                    f"of {len(capacities)} ffn workers is less than {needed} bytes",
                )
            room.sort(key=lambda name: used[name] - size * ((layer, expert) in held[name]))
            for name in room[:copies]:
                chosen[name][layer].append(expert)
                used[name] += size
    return {name: tuple(map(tuple, experts)) for name, experts in chosen.items()}
