"""FFN workers that are killed, hang or lie, with rows out on every lane: the tokens are as if nothing had been."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

import ffn_nodes.worker
from anabranch.config.topology import AttnPoolConfig, FfnPoolConfig, PoolConfig, Pools, RestartConfig, Topology
from anabranch_client import Admin, Client
from benchmarks.spoiling_proxy import SpoilingProxy
from launch.cluster import LocalCluster
from tests.support.in_process import InProcessCluster, wait_until
from tests.support.known import Known
from tests.support.load import Load
from tests.support.waiting import WAIT_S

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

READY_TIMEOUT_S = 120.0
FFN_TIMEOUT_S = 1.0
FFN_UNAVAILABLE_S = 3.0
NUM_STREAMS = 8
NUM_TOKENS = 60
PROMPTS = [tuple((number * 31 + index) % 97 + 3 for index in range(10 + number % 7)) for number in range(NUM_STREAMS)]
SMALL = {"threads": 1, "kv_cache_bytes": 16 << 20, "offload_bytes": 0, "preemption": "recompute"}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """Sparse and dense layers, and a shared expert."""
    return Known("qwen2-moe-mixed", tmp_path_factory.mktemp("mixture"), 640)


@contextmanager
def running(
    model: Known, *, num_attn: int = 1, num_ffn: int = 2, replicas: int = 0, transport: str = "auto"
) -> Iterator[tuple[LocalCluster, Client, Admin]]:
    topology = Topology(
        model=str(model.folder),
        dtype="float32",
        native_kernels=False,
        prefix_cache=False,
        ffn_transport=transport,  # type: ignore[arg-type]
        ffn_timeout_s=FFN_TIMEOUT_S,
        ffn_unavailable_s=FFN_UNAVAILABLE_S,
        restart=RestartConfig(policy="never"),
        pools=Pools(
            prefill=PoolConfig(**SMALL),  # type: ignore[arg-type]
            attn=AttnPoolConfig(workers=num_attn, lanes=2, **SMALL),  # type: ignore[arg-type]
            ffn=FfnPoolConfig(workers=num_ffn, threads=1, replicas=replicas),
        ),
    )
    with (
        LocalCluster(topology, ready_timeout_s=READY_TIMEOUT_S) as cluster,
        Client(cluster.endpoint, timeout_s=60.0) as client,
        Admin(cluster.endpoint, token_file=cluster.admin_token_file) as admin,
    ):
        yield cluster, client, admin


def undisturbed(client: Client) -> list[list[int]]:
    load = Load(client, PROMPTS, NUM_TOKENS)
    assert all(": " not in result for result in load.results())
    return load.tokens


def under_way(load: Load) -> bool:
    """Whether every stream has some tokens."""
    return all(len(tokens) > 5 for tokens in load.tokens)


def strike(client: Client, act: Callable[[], None]) -> tuple[list[list[int]], list[str]]:
    """All streams, with something done in their middle: tokens, and how each ended."""
    load = Load(client, PROMPTS, NUM_TOKENS)
    wait_until(lambda: under_way(load) or bool(load.failed()), "tokens of all streams")
    assert any(len(tokens) < NUM_TOKENS for tokens in load.tokens)
    act()
    return load.tokens, load.results()


def test_a_killed_node_changes_no_token(mixture: Known) -> None:
    with running(mixture, transport="tcp") as (cluster, client, admin):
        expected = undisturbed(client)
        tokens, ends = strike(client, lambda: os.kill(cluster.process("ffn-0").pid, signal.SIGKILL))
        assert tokens == expected
        assert set(ends) == {"prefill-0+attn-0"}
        wait_until(lambda: "ffn-0" not in {worker.name for worker in admin.cluster().workers}, "ffn-0 to be gone")
        # Those that are left serve alone.
        assert undisturbed(client) == expected
        assert [death.name for death in cluster.deaths] == ["ffn-0"]


def test_a_stopped_node_changes_no_token_and_is_not_used_again(mixture: Known) -> None:
    with running(mixture, transport="shm") as (cluster, client, admin):
        expected = undisturbed(client)
        pid = cluster.process("ffn-1").pid
        tokens, ends = strike(client, lambda: os.kill(pid, signal.SIGSTOP))
        assert tokens == expected
        assert set(ends) == {"prefill-0+attn-0"}
        wait_until(lambda: "ffn-1" not in {worker.name for worker in admin.cluster().workers}, "ffn-1 to be gone")
        tokens, _ = strike(client, lambda: os.kill(pid, signal.SIGCONT))
        assert tokens == expected
        # It is told that it counts as dead.
        assert cluster.wait_for_death(WAIT_S) is not None
        assert undisturbed(client) == expected


def test_a_pause_shorter_than_the_timeouts_is_none(mixture: Known) -> None:
    with running(mixture, num_ffn=1) as (cluster, client, _):
        expected = undisturbed(client)
        pid = cluster.process("ffn-0").pid

        def pause() -> None:
            os.kill(pid, signal.SIGSTOP)
            threading.Timer(FFN_TIMEOUT_S / 3, os.kill, (pid, signal.SIGCONT)).start()

        tokens, ends = strike(client, pause)
        assert tokens == expected
        assert set(ends) == {"prefill-0+attn-0"}
        assert cluster.deaths == ()


def test_without_a_replica_requests_end_by_name_and_in_time(mixture: Known) -> None:
    with running(mixture, num_ffn=1) as (cluster, client, admin):
        undisturbed(client)
        _, ends = strike(client, lambda: os.kill(cluster.process("ffn-0").pid, signal.SIGKILL))
        # They wait for one to come, though not for ever.
        lost = [end for end in ends if end.startswith("no_workers: ")]
        assert lost
        for end in lost:
            assert "no_worker_grace_s: for" in end
            assert "no ffn worker is there" in end
        wait_until(lambda: admin.cluster().num_requests == 0, "idle")
        wait_until(
            lambda: all(
                (worker.num_free_blocks, worker.num_running) == (worker.num_total_blocks, 0)
                for worker in admin.cluster().workers
            ),
            "blocks to be back",
        )


def test_without_a_replica_survivors_take_over_what_fits(mixture: Known) -> None:
    with running(mixture, num_ffn=2, replicas=1) as (cluster, client, _):
        expected = undisturbed(client)
        tokens, ends = strike(client, lambda: os.kill(cluster.process("ffn-1").pid, signal.SIGKILL))
        assert tokens == expected
        assert set(ends) == {"prefill-0+attn-0"}
        assert undisturbed(client) == expected


def test_requests_of_an_attention_node_that_dies_go_on_at_another(mixture: Known) -> None:
    with running(mixture, num_attn=2, num_ffn=1) as (cluster, client, admin):
        expected = undisturbed(client)
        ffn = psutil.Process(cluster.process("ffn-0").pid)

        def held() -> tuple[int, int]:
            return ffn.num_fds(), len(ffn.memory_maps(grouped=False))

        fds, maps = held()
        tokens, ends = strike(client, lambda: os.kill(cluster.process("attn-0").pid, signal.SIGKILL))
        assert tokens == expected
        assert set(ends) == {"prefill-0+attn-1"}
        assert undisturbed(client) == expected
        wait_until(lambda: held()[0] < fds and held()[1] < maps, "its link to be gone", describe=held)
        wait_until(lambda: admin.cluster().num_requests == 0, "idle")
        assert [death.name for death in cluster.deaths] == ["attn-0"]


@pytest.mark.parametrize("good_bytes", [1 << 12, 50_000, 123_457])
def test_a_byte_that_changes_on_its_way_changes_no_token(
    mixture: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good_bytes: int
) -> None:
    expected = dict(mixture.clear(length, 9) for length in (1, 2, 5, 17, 63))
    proxies: list[SpoilingProxy] = []
    tell = ffn_nodes.worker.ffn_worker_info

    def through_proxies(*args: object, **named: object):  # type: ignore[no-untyped-def]
        info = tell(*args, **named)  # type: ignore[arg-type]
        proxies.append(SpoilingProxy(info.addresses["tcp"], good_bytes))
        return msgspec.structs.replace(info, addresses={"tcp": proxies[-1].address})

    monkeypatch.setattr(ffn_nodes.worker, "ffn_worker_info", through_proxies)
    try:
        with (
            InProcessCluster(
                tmp_path, mixture.folder, ("prefill", "attn", "ffn"), ffn_transport="tcp", ffn_timeout_s=FFN_TIMEOUT_S
            ) as cluster,
            Client(cluster.endpoint, timeout_s=60.0) as client,
        ):
            load = Load(client, PROMPTS[:8], 40)
            assert all(": " not in result for result in load.results())
            again = Load(client, PROMPTS[:8], 40)
            assert all(": " not in result for result in again.results())
            assert load.tokens == again.tokens
            for prompt, answer in expected.items():
                checked = Load(client, [prompt], len(answer))
                checked.results()
                assert tuple(checked.tokens[0]) == answer
            cluster.wait_idle()
            assert sum(proxy.num_spoilt for proxy in proxies) == 1
    finally:
        for proxy in proxies:
            proxy.close()
