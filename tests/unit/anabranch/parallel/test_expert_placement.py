"""Every expert has its owners, nobody more than its capacity, and what need not move stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.parallel.expert_placement import place

pytestmark = pytest.mark.unit

Holding = tuple[tuple[int, ...], ...]
# Two sparse layers and dense ones around them.
LAYERS = [(1, 30), (8, 10), (1, 30), (5, 10)]


def copies(placement: Mapping[str, Holding]) -> Counter[tuple[int, int]]:
    return Counter(
        (layer, expert) for holding in placement.values() for layer, experts in enumerate(holding) for expert in experts
    )


def num_bytes(holding: Holding, layers: Sequence[tuple[int, int]]) -> int:
    return sum(len(experts) * size for experts, (_, size) in zip(holding, layers, strict=True))


def num_moves(before: Mapping[str, Holding], after: Mapping[str, Holding]) -> int:
    """Copies that have to be loaded."""
    return sum((copies({name: after[name]}) - copies({name: before.get(name, ())})).total() for name in after)


def rows(placement: Mapping[str, Holding], loads: Sequence[Sequence[float]], layer: int) -> list[float]:
    """Rows of a layer at each worker, where an expert's copies share its rows."""
    held_by = copies(placement)
    return [
        sum(loads[layer][expert] / held_by[layer, expert] for expert in holding[layer])
        for holding in placement.values()
    ]


def skew(values: Sequence[float]) -> float:
    return max(values) / (sum(values) / len(values))


def zipf(num_experts: int, exponent: float, first: int = 0) -> list[float]:
    """Rows of each expert; the hottest is `first`."""
    ranks = [(expert - first) % num_experts for expert in range(num_experts)]
    return [1000.0 / (rank + 1) ** exponent for rank in ranks]


@st.composite
def models(draw: st.DrawFn) -> list[tuple[int, int]]:
    sparse = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    kinds = st.one_of(st.just((1, sparse[0])), st.tuples(st.integers(2, 9), st.just(sparse[1])))
    return draw(st.lists(kinds, min_size=1, max_size=6))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), layers=models(), num_nodes=st.integers(1, 6))
def test_every_expert_is_owned_and_capacity_is_kept(
    data: st.DataObject, layers: list[tuple[int, int]], num_nodes: int
) -> None:
    replicas = data.draw(st.integers(0, num_nodes))
    whole = sum(count * size for count, size in layers)
    largest = max(size for _, size in layers)
    enough = whole * (replicas or num_nodes) // num_nodes + whole + largest * num_nodes
    capacities = {f"n{i}": data.draw(st.sampled_from([0, enough, 2 * enough])) for i in range(num_nodes)}
    loads = data.draw(
        st.one_of(st.none(), st.tuples(*[st.lists(st.floats(0, 100), min_size=c, max_size=c) for c, _ in layers]))
    )
    current = {
        f"n{i}": tuple(
            tuple(sorted(data.draw(st.sets(st.integers(0, count + 1), max_size=count)))) for count, _ in layers
        )
        for i in data.draw(st.sets(st.integers(0, 8), max_size=6))
    }
    placement = place(layers, capacities, replicas=replicas, current=current, loads=loads)
    assert placement.keys() == capacities.keys()
    held_by = copies(placement)
    assert held_by.keys() == {(layer, expert) for layer, (count, _) in enumerate(layers) for expert in range(count)}
    fewest = replicas or num_nodes
    for (layer, _), count in held_by.items():
        assert fewest <= count <= num_nodes
        assert count == fewest or (loads is not None and layers[layer][0] > 1)
    for name, holding in placement.items():
        assert all(list(experts) == sorted(set(experts)) for experts in holding)
        assert not capacities[name] or num_bytes(holding, layers) <= capacities[name]
    # It is settled: nothing moves where nothing has changed.
    if loads is None:
        assert place(layers, capacities, replicas=replicas, current=placement) == placement


@settings(max_examples=150, deadline=None)
@given(data=st.data(), num_nodes=st.integers(1, 6), num_experts=st.integers(2, 12))
def test_equal_experts_fill_workers_to_the_last(data: st.DataObject, num_nodes: int, num_experts: int) -> None:
    slots = data.draw(st.lists(st.integers(0, num_experts), min_size=num_nodes, max_size=num_nodes))
    replicas = data.draw(st.integers(1, num_nodes))
    capacities = {f"n{i}": 10 * count + 9 for i, count in enumerate(slots)}
    assume(sum(min(count, num_experts) for count in slots) >= replicas * num_experts)
    placement = place([(num_experts, 10)], capacities, replicas=replicas)
    assert set(copies(placement).values()) == {replicas}
    assert all(num_bytes(holding, [(num_experts, 10)]) <= capacities[name] for name, holding in placement.items())


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 7])
def test_counts_that_do_not_divide_are_shared_out_evenly(num_nodes: int) -> None:
    placement = place(LAYERS, {f"n{i}": 0 for i in range(num_nodes)}, replicas=1)
    for layer, (count, _) in enumerate(LAYERS):
        held = [len(holding[layer]) for holding in placement.values()]
        assert sum(held) == count
        assert max(held) - min(held) <= 1
    dense = [len(holding[0]) + len(holding[2]) for holding in placement.values()]
    assert max(dense) - min(dense) <= 1
    everywhere = place(LAYERS, {f"n{i}": 0 for i in range(num_nodes)}, replicas=0)
    assert set(everywhere.values()) == {tuple(tuple(range(count)) for count, _ in LAYERS)}


def test_a_worker_that_comes_takes_its_share_and_one_that_goes_leaves_it() -> None:
    layers = [(12, 10), (1, 10)]
    two = place(layers, {"a": 0, "b": 0}, replicas=1)
    three = place(layers, {"a": 0, "b": 0, "c": 0}, replicas=1, current=two)
    assert [len(holding[0]) for holding in three.values()] == [4, 4, 4]
    assert num_moves(two, three) == 4
    again = place(layers, {"a": 0, "c": 0}, replicas=1, current=three)
    assert [len(holding[0]) for holding in again.values()] == [6, 6]
    # Only what the lost one held is loaded.
    assert num_moves(three, again) == copies({"b": three["b"]}).total()
    # What is held beyond that is no reason to load anything.
    more = {"a": three["a"], "b": two["b"]}
    assert num_moves(more, place(layers, {"a": 0, "b": 0}, replicas=1, current=more)) == 2


@pytest.mark.parametrize("num_experts", [8, 16, 64])
@pytest.mark.parametrize("exponent", [1.0, 1.2, 1.6])
def test_a_zipf_skewed_load_is_evened_out(num_experts: int, exponent: float) -> None:
    layers = [(num_experts, 10)] * 4
    capacities = {f"n{i}": 0 for i in range(4)}
    # The hottest experts of all layers lie together, as they may where nothing was measured.
    before = {f"n{i}": (tuple(range(i * num_experts // 4, (i + 1) * num_experts // 4)),) * 4 for i in range(4)}
    loads = [zipf(num_experts, exponent)] * 4
    assert all(skew(rows(before, loads, layer)) >= 2.0 for layer in range(4))
    after = place(layers, capacities, replicas=1, current=before, loads=loads)
    assert all(skew(rows(after, loads, layer)) <= 1.3 for layer in range(4))
    # Few copies, and few moves: at most a quarter of the experts, or a handful of hot ones.
    assert copies(after).total() <= 4 * (num_experts + 6)
    assert num_moves(before, after) <= 4 * max(num_experts // 4, 8)
    again = place(layers, capacities, replicas=1, current=after, loads=loads)
    assert num_moves(after, again) == 0
    # The load moves on; what was hot has no use for its copies any more.
    moved = [zipf(num_experts, exponent, first=num_experts // 2)] * 4
    later = place(layers, capacities, replicas=1, current=after, loads=moved)
    assert all(skew(rows(later, moved, layer)) <= 1.3 for layer in range(4))
    assert copies(later).total() <= 4 * (num_experts + 6)


def test_without_room_for_copies_experts_move_as_far_as_that_helps() -> None:
    layers = [(8, 10)]
    capacities = {f"n{i}": 20 for i in range(4)}
    before = {f"n{i}": ((2 * i, 2 * i + 1),) for i in range(4)}
    loads = [[50.0, 50.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0]]
    after = place(layers, capacities, replicas=1, current=before, loads=loads)
    assert sorted(rows(after, loads, 0)) == [20, 20, 60, 60]
    assert num_moves(before, after) == 2


@pytest.mark.parametrize(
    ("capacities", "replicas", "message"),
    [
        ({}, 1, "ffn.workers: 0: no ffn worker"),
        ({"a": 0, "b": 0}, 3, r"replicas: 3: must be at most the number of ffn workers \(2\); 0: all"),
        ({"a": 90, "b": 99}, 1, r"capacity: 189: bytes are too few for 15 experts of at most 30 bytes, 1 of each"),
        ({"a": 20}, 0, r"capacity: 20: bytes are too few for 15 experts of at most 30 bytes.*\(190 bytes; a 20\)"),
        ({"a": 0, "b": 189}, 0, "raise capacity, lower replicas, or add ffn workers"),
        ({"a": 0, "b": 189}, 2, "a no limit, b 189"),
    ],
)
def test_what_cannot_be_is_refused_with_its_numbers(capacities: dict[str, int], replicas: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(LAYERS, capacities, replicas=replicas)


def test_what_just_fits_is_placed() -> None:
    assert set(place(LAYERS, {"a": 190, "b": 190}, replicas=2).values()) == {
        ((0,), tuple(range(8)), (0,), tuple(range(5)))
    }
    tight = place(LAYERS, {"a": 100, "b": 90}, replicas=1)
    assert [num_bytes(holding, LAYERS) for holding in tight.values()] == [100, 90]
