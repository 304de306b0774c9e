"""FFN workers come and go while requests run: no request fails, and the tokens are as if nothing had been."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from anabranch.config.topology import AttnPoolConfig, FfnPoolConfig, PoolConfig, Pools, RestartConfig, Topology
from anabranch.model.size import expert_bytes, num_experts
from anabranch.model.sources import resolve_model
from anabranch_client import Admin, Client, InvalidRequest
from launch.cluster import LocalCluster
from tests.support.in_process import wait_until
from tests.support.known import Known
from tests.support.load import Load

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

READY_TIMEOUT_S = 120.0
NUM_TOKENS = 60
PROMPTS = [tuple((number * 31 + index) % 97 + 3 for index in range(10 + number % 7)) for number in range(8)]
SMALL = {"threads": 1, "kv_cache_bytes": 16 << 20, "offload_bytes": 0, "preemption": "recompute"}
# What a process's memory may differ by: allocators keep some.
SLACK_BYTES = 24 << 20


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """Sparse and dense layers, and a shared expert."""
    return Known("qwen2-moe-mixed", tmp_path_factory.mktemp("mixture"), 640)


@contextmanager
def running(model: Known, *, num_ffn: int, replicas: int) -> Iterator[tuple[LocalCluster, Client, Admin]]:
    topology = Topology(
        model=str(model.folder),
        dtype="float32",
        native_kernels=False,
        prefix_cache=False,
        ffn_timeout_s=1.0,
        ffn_unavailable_s=20.0,
        restart=RestartConfig(policy="never"),
        pools=Pools(
            prefill=PoolConfig(**SMALL),  # type: ignore[arg-type]
            attn=AttnPoolConfig(lanes=2, **SMALL),  # type: ignore[arg-type]
            # No more copies than asked for.
            ffn=FfnPoolConfig(workers=num_ffn, threads=1, replicas=replicas, rebalance_s=0),
        ),
    )
    with (
        LocalCluster(topology, ready_timeout_s=READY_TIMEOUT_S) as cluster,
        Client(cluster.endpoint, timeout_s=60.0) as client,
        Admin(cluster.endpoint, token_file=cluster.admin_token_file) as admin,
    ):
        yield cluster, client, admin


def answers(client: Client) -> list[list[int]]:
    load = Load(client, PROMPTS, NUM_TOKENS)
    assert set(load.results()) == {"prefill-0+attn-0"}
    return load.tokens


def answers_until(client: Client, expected: list[list[int]], condition: Callable[[], bool]) -> None:
    """Have all streams answered again and again, with the same tokens, until a condition holds."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        assert answers(client) == expected
    assert answers(client) == expected


def ffn_names(admin: Admin) -> set[str]:
    return {worker.name for worker in admin.cluster().workers if worker.role == "ffn"}


def held_bytes(admin: Admin) -> dict[str, int]:
    """FFN worker -> bytes of its weights."""
    return {worker.name: worker.ffn_load.bytes for worker in admin.cluster().workers if worker.ffn_load is not None}


@pytest.mark.parametrize("replicas", [0, 1])
def test_one_grows_to_three_and_back(mixture: Known, replicas: int) -> None:
    with running(mixture, num_ffn=1, replicas=replicas) as (cluster, client, admin):
        expected = answers(client)
        [total] = held_bytes(admin).values()
        config = resolve_model(str(mixture.folder)).config()
        experts = [(num_experts(config, i), expert_bytes(config, "float32", i)) for i in range(config.num_layers)]
        assert total == sum(count * num_bytes for count, num_bytes in experts)
        copies = 1 if replicas else 3
        kept = {name: psutil.Process(cluster.process(name).pid) for name in ("attn-0", "ffn-0")}

        def held() -> dict[str, tuple[int, int]]:
            return {name: (process.num_fds(), process.num_threads()) for name, process in kept.items()}

        before = held()
        memory = {name: process.memory_info().rss for name, process in kept.items()}
        admin.scale_ffn(3)
        grown = {"ffn-0", "ffn-1", "ffn-2"}
        # Each has its share, and what has been taken from the first is gone.
        answers_until(
            client,
            expected,
            lambda: (
                min((held := held_bytes(admin)).values()) > 0
                and held.keys() == grown
                and sum(held.values()) == copies * total
            ),
        )
        assert [process.name for process in cluster.processes if process.role == "ffn"] == sorted(grown)
        admin.scale_ffn(1)
        answers_until(client, expected, lambda: set(cluster.ffn_workers()) == {"ffn-0"} == ffn_names(admin))
        wait_until(lambda: [p.name for p in cluster.processes if p.role == "ffn"] == ["ffn-0"], "the others to end")
        assert cluster.deaths == ()
        assert all(departure.expected for departure in admin.cluster().departures)
        wait_until(lambda: held() == before, "links and descriptors to be back", describe=lambda: (before, held()))
        wait_until(lambda: held_bytes(admin) == {"ffn-0": total}, "all experts to be at the one that is left")
        for name, process in kept.items():
            assert process.memory_info().rss < memory[name] + SLACK_BYTES, name
        # The names are free again.
        admin.scale_ffn(2)
        answers_until(client, expected, lambda: ffn_names(admin) == {"ffn-0", "ffn-1"})


@pytest.mark.parametrize(("victim", "replicas"), [("ffn-0", 0), ("ffn-2", 1)])
def test_a_node_dies_while_experts_move(mixture: Known, victim: str, replicas: int) -> None:
    with running(mixture, num_ffn=2, replicas=replicas) as (cluster, client, admin):
        expected = answers(client)
        admin.scale_ffn(3)
        load: Load | None = None
        while "ffn-2" not in ffn_names(admin):
            load = Load(client, PROMPTS, NUM_TOKENS)
            wait_until(
                lambda: all(end.done() for end in load.ends) or "ffn-2" in ffn_names(admin),  # noqa: B023
                "ffn-2, or all answers",
                READY_TIMEOUT_S,
            )
            if "ffn-2" not in ffn_names(admin):
                load.results()
        os.kill(cluster.process(victim).pid, signal.SIGKILL)
        if load is not None:
            assert set(load.results()) == {"prefill-0+attn-0"}
            assert load.tokens == expected
        left = {"ffn-0", "ffn-1", "ffn-2"} - {victim}
        answers_until(client, expected, lambda: ffn_names(admin) == left)
        assert [death.name for death in cluster.deaths] == [victim]


def test_what_cannot_be_is_refused_by_name(mixture: Known) -> None:
    with running(mixture, num_ffn=1, replicas=1) as (cluster, _, admin):
        for workers in (0, -1, 257, 2**40):
            with pytest.raises(InvalidRequest, match=rf"workers: {workers}: give 1 to 256"):
                admin.scale_ffn(workers)
        with pytest.raises(InvalidRequest, match="workers"):
            admin.scale_ffn(2**64)
        assert cluster.ffn_workers() == ("ffn-0",)
