"""Experts move to where there is less to do, and no expert is without an owner meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.parallel.expert_placement import imbalance
from anabranch.protocol.ffn import FfnPlacement, Holding
from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import ExpertRows, FfnNodes, Place, Placed, ToWorker, WorkerInfo
from orchestrator import ffn_pool
from orchestrator.ffn_pool import FfnPool
from orchestrator.membership import Member
from tests.support.waiting import eventually_async

pytestmark = pytest.mark.unit

LAYERS = ((16, 10),) * 3 + ((1, 30),)
ALL = {(layer, expert) for layer, (count, _) in enumerate(LAYERS) for expert in range(count)}
REBALANCE_S = 100


class Model:
    def expert_bytes(self, dtype: str, *, shared: bool) -> tuple[tuple[int, int], ...]:
        return LAYERS


def member(name: str, role: str) -> Member:
    whatever = dict.fromkeys(
        (
            "pid",
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_context",
            "num_blocks",
            "block_size",
            "num_threads",
            "incarnation",
        ),
        1,
    )
    texts = dict.fromkeys(("host", "model", "model_fingerprint", "device"), "x")
    info = WorkerInfo(name=name, role=role, kv_dtype="float32", planes=(), **texts, **whatever)  # type: ignore[arg-type]
    return Member(info, name.encode(), 0.0)


class Cluster:
    """A pool, an attention worker, and FFN workers that hold what they are told, each expert in turn."""

    def __init__(self, num_nodes: int, replicas: int = 1) -> None:
        self.now_s = 0.0
        self.orders: list[tuple[str, Place]] = []
        self.placements: list[FfnPlacement] = []
        self.lost: list[str] = []
        # What an FFN worker says to an order, where it is not that it has obeyed.
        self.refuse: dict[str, str] = {}
        self.held: dict[str, set[tuple[int, int]]] = {}
        config = OrchestratorConfig(ffn_workers=num_nodes, ffn_replicas=replicas, ffn_rebalance_s=REBALANCE_S)
        self.pool = FfnPool(config, Model(), self, lambda: None)  # type: ignore[arg-type]
        self.attn = member("attn-0", "attn")
        self.nodes = {name: member(name, "ffn") for name in (f"ffn-{number}" for number in range(num_nodes))}
        self.held = {name: set() for name in self.nodes}

    def now(self) -> float:
        return self.now_s

    async def send(self, to: Member, message: ToWorker) -> None:
        if isinstance(message, FfnNodes):
            self.placements.append(message.placement)
            self.check(message.placement)
        elif isinstance(message, Place):
            self.orders.append((to.name, message))
            error = self.refuse.get(to.name)
            if error is None:
                wanted = {(layer, expert) for layer, experts in enumerate(message.holding) for expert in experts}
                # What it does not name any more goes at once: harder than in life.
                self.held[to.name] = wanted
                if self.placements:
                    self.check(self.placements[-1])
            wire = None if error is None else WireError(code="config", message=error)
            self.pool.placed(to, Placed(version=message.version, error=wire))

    def lose(self, gone: Member, reason: str) -> None:
        self.lost.append(f"{gone.name}: {reason}")

    def check(self, placement: FfnPlacement) -> None:
        """Whoever is said to hold an expert does, and every expert has an owner."""
        owned = {
            (node.name, layer, expert)
            for node in placement.nodes
            for layer, experts in enumerate(node.holding)
            for expert in experts
        }
        assert {(layer, expert) for _, layer, expert in owned} == ALL
        assert [item for item in owned if item[1:] not in self.held[item[0]]] == []

    @property
    def holdings(self) -> dict[str, Holding]:
        return {node.name: node.holding for node in self.placements[-1].nodes}

    async def settled(self) -> None:
        await eventually_async(
            lambda: (
                bool(self.placements)
                and {name: frozenset(held) for name, held in self.held.items()}
                == {
                    node.member.name: node.target  # what it shall hold, and nothing else
                    for node in self.pool._nodes.values()
                }
                and not self.pool._due.is_set()
            )
        )
        # Whatever is under way on the planning thread.
        await asyncio.sleep(0.02)

    def compute(self, loads: list[list[float]], rng: random.Random, rows: int = 20_000) -> None:
        """Have all workers report what they have computed: copies share an expert's rows, and chance has its part."""
        counted = {name: [[0] * count if count > 1 else [] for count, _ in LAYERS] for name in self.nodes}
        for layer, weights in enumerate(loads):
            for expert, weight in enumerate(weights):
                holders = [name for name, holding in self.holdings.items() if expert in holding[layer]]
                for name in holders:
                    share = rows * weight / sum(weights) / len(holders)
                    counted[name][layer][expert] = round(share * rng.uniform(0.95, 1.05))
        for name, by_layer in counted.items():
            self.pool.measured(self.nodes[name], ExpertRows(rows=tuple(map(tuple, by_layer))))


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(scenario: Callable[[Cluster], Awaitable[None]], num_nodes: int = 4, replicas: int = 1) -> None:
        async def main() -> None:
            cluster = Cluster(num_nodes, replicas)
            monkeypatch.setattr(ffn_pool, "loop_clock", lambda: cluster)
            running = asyncio.create_task(cluster.pool.run())
            cluster.pool.changed(cluster.attn)
            for node in cluster.nodes.values():
                cluster.pool.changed(node)
            playing = asyncio.create_task(_play(cluster))
            await asyncio.wait((running, playing), return_when=asyncio.FIRST_COMPLETED)
            cluster.pool.close()
            if running.done():
                playing.cancel()
                running.result()
            running.cancel()
            await playing

        async def _play(cluster: Cluster) -> None:
            await cluster.settled()
            await scenario(cluster)

        asyncio.run(main())

    return run


def zipf(hottest: Holding, exponent: float = 1.2) -> list[list[float]]:
    """Of each layer, the experts that one worker holds are the hottest."""
    loads = []
    for layer, (count, _) in enumerate(LAYERS[:3]):
        order = [*hottest[layer], *(expert for expert in range(count) if expert not in hottest[layer])]
        loads.append([1.0 / (order.index(expert) + 1) ** exponent for expert in range(count)])
    return loads


def test_a_skewed_load_is_evened_out_and_then_left_alone(play: Callable[..., None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        rng = random.Random(1)
        loads = zipf(cluster.holdings["ffn-0"])
        assert imbalance(cluster.holdings.values(), loads) >= 2.0
        first = cluster.placements[-1].version
        cluster.compute(loads, rng)
        # Not at once: a few requests say little.
        await cluster.settled()
        assert cluster.placements[-1].version == first
        cluster.now_s += REBALANCE_S
        cluster.compute(loads, rng)
        await eventually_async(lambda: cluster.placements[-1].version > first)
        await cluster.settled()
        assert imbalance(cluster.holdings.values(), loads) <= 1.3
        loaded = sum(map(len, cluster.held.values())) - len(ALL)
        assert 0 <= loaded <= 0.25 * len(ALL) + 4
        # Nothing moves for noise, for however long.
        settled, orders = cluster.placements[-1].version, len(cluster.orders)
        for _ in range(50):
            cluster.now_s += REBALANCE_S / 5
            noisy = [[weight * rng.uniform(0.85, 1.15) for weight in weights] for weights in loads]
            cluster.compute(noisy, rng, rows=2000)
            await asyncio.sleep(0)
        await cluster.settled()
        assert (cluster.placements[-1].version, len(cluster.orders)) == (settled, orders)
        # The load moves on, and so do experts, once.
        moved = zipf(cluster.holdings["ffn-2"])
        for _ in range(15):
            cluster.now_s += REBALANCE_S / 5
            cluster.compute(moved, rng)
            await cluster.settled()
        assert cluster.placements[-1].version > settled
        assert imbalance(cluster.holdings.values(), moved) <= 1.3
        assert cluster.lost == []

    play(scenario)


def test_everything_on_all_is_never_uneven(play: Callable[..., None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        version = cluster.placements[-1].version
        for _ in range(5):
            cluster.now_s += REBALANCE_S
            cluster.compute(zipf(((0, 1, 2, 3),) * 3), random.Random(2))
            await cluster.settled()
        assert cluster.placements[-1].version == version

    play(scenario, num_nodes=2, replicas=0)


def test_a_worker_that_cannot_load_for_the_load_goes_on_with_what_it_holds(play: Callable[..., None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        rng = random.Random(3)
        loads = zipf(cluster.holdings["ffn-0"])
        cluster.compute(loads, rng)
        cluster.refuse = dict.fromkeys(cluster.nodes, "memory: there is none")
        cluster.now_s += REBALANCE_S
        orders = len(cluster.orders)
        cluster.compute(loads, rng)
        await eventually_async(lambda: len(cluster.orders) > orders)
        cluster.refuse.clear()
        await cluster.settled()
        # All serve, what they held or as much of it.
        assert set(cluster.holdings) == set(cluster.nodes)
        assert not any(node.problem for node in cluster.pool._nodes.values())
        version = cluster.placements[-1].version
        for _ in range(5):
            cluster.now_s += REBALANCE_S
            cluster.compute(loads, rng)
            await cluster.settled()
        assert cluster.placements[-1].version == version

    play(scenario)


def test_rows_of_another_model_or_worker_change_nothing(play: Callable[..., None]) -> None:
    async def scenario(cluster: Cluster) -> None:
        version = cluster.placements[-1].version
        cluster.pool.measured(cluster.nodes["ffn-0"], ExpertRows(rows=((1, 2),)))
        stranger = member("ffn-9", "ffn")
        rows = ExpertRows(rows=tuple((10**6,) + (0,) * 15 if count > 1 else () for count, _ in LAYERS))
        for _ in range(3):
            cluster.now_s += REBALANCE_S
            cluster.pool.measured(stranger, rows)
        await cluster.settled()
        assert cluster.placements[-1].version == version

    play(scenario)
