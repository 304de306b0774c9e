"""Attention and FFN apart: M attention and N FFN workers give transformers' greedy tokens, whatever M, N and lanes are.

Pairwise: every value of each column stands with every pair (M, N) or most of them. Most run as threads of the test's
process, with real sockets and slots of shared memory; the last ones as processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from anabranch.config.topology import AttnPoolConfig, FfnPoolConfig, PoolConfig, Pools, Topology
from anabranch_client import Client
from launch.cluster import LocalCluster
from tests.e2e.test_mesh import Answers, Degrees, check_alike, check_all, check_cached, mesh_of
from tests.support.in_process import InProcessCluster
from tests.support.known import Known
from tests.support.m2n import REASONS

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("one_thread")]

CONTEXT = 640
LENGTHS = (1, 2, 5, 17, 63, 410)
NUM_TOKENS = 9
TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Apart:
    """M attention workers and N FFN workers, and how they are run.

    Attributes:
        prefill, attn: meshes, (tp, cp).
        replicas: FFN workers that hold each expert; 0: all.
    """

    workers: tuple[int, int]
    recipe: str
    lanes: int = 2
    transport: str = "shm"
    replicas: int = 1
    prefill: Degrees = (1, 1)
    attn: Degrees = (1, 1)
    combine: str = "auto"
    shared_expert: str = "attn"

    def __str__(self) -> str:
        num_attn, num_ffn = self.workers
        meshes = f"{self.prefill[0]}x{self.prefill[1]}to{self.attn[0]}x{self.attn[1]}"
        pooled = "-shared-in-pool" * (self.shared_expert == "ffn")
        return (
            f"{num_attn}+{num_ffn}-{self.recipe}-lanes{self.lanes}-{self.transport}-r{self.replicas}-{meshes}{pooled}"
        )


SPLITS = (
    Apart(workers=(1, 1), recipe="llama-gqa-tied", lanes=1),
    Apart(workers=(1, 1), recipe="mixtral", lanes=2, transport="tcp"),
    Apart(workers=(1, 1), recipe="qwen2-moe-mixed", lanes=4, attn=(2, 1)),
    Apart(workers=(1, 2), recipe="qwen2-moe-mixed", lanes=2, prefill=(2, 1)),
    Apart(workers=(1, 2), recipe="llama-gqa-tied", lanes=3, transport="tcp", replicas=2),
    Apart(workers=(1, 3), recipe="qwen3-moe-mixed", lanes=1, replicas=2, prefill=(1, 2)),
    Apart(workers=(1, 3), recipe="mixtral", lanes=4, attn=(1, 2)),
    Apart(workers=(2, 1), recipe="qwen3-moe-mixed", lanes=2, attn=(1, 2)),
    Apart(workers=(2, 1), recipe="llama-gqa-tied", lanes=4, prefill=(1, 3)),
    Apart(workers=(2, 2), recipe="mixtral", lanes=3, replicas=2, attn=(2, 1)),
    Apart(workers=(2, 2), recipe="qwen2-moe-mixed", lanes=1, transport="tcp", prefill=(2, 2)),
    Apart(workers=(2, 3), recipe="llama-gqa-tied", lanes=2, replicas=2, attn=(2, 2)),
    Apart(workers=(2, 3), recipe="qwen3-moe-mixed", lanes=3, transport="tcp", prefill=(2, 1)),
    Apart(workers=(3, 1), recipe="mixtral", lanes=1, prefill=(1, 2)),
    Apart(workers=(3, 1), recipe="qwen2-moe-mixed", lanes=3, transport="tcp"),
    Apart(workers=(3, 2), recipe="qwen3-moe-mixed", lanes=4, transport="tcp", replicas=2),
    Apart(workers=(3, 2), recipe="llama-gqa-tied", lanes=2, transport="tcp", attn=(1, 2)),
    Apart(workers=(3, 3), recipe="qwen2-moe-mixed", lanes=2, replicas=2),
    Apart(workers=(3, 3), recipe="mixtral", lanes=2, replicas=0, combine="slots"),
    # Shared experts in the pool, on a worker of their own or beside others, of one rank of attention and of two.
    Apart(workers=(1, 2), recipe="qwen2-moe-mixed", lanes=2, shared_expert="ffn"),
    Apart(workers=(2, 3), recipe="qwen2-moe-mixed", lanes=1, replicas=2, attn=(2, 1), shared_expert="ffn"),
    # As many lanes as are best, from step to step.
    Apart(workers=(2, 2), recipe="llama-gqa-tied", lanes=0),
    Apart(workers=(4, 1), recipe="qwen3-moe-mixed", lanes=2),
    Apart(workers=(1, 4), recipe="qwen2-moe-mixed", lanes=3),
    Apart(workers=(1, 4), recipe="mixtral", lanes=1, replicas=2, transport="tcp"),
    # An expert, and so a worker, that no row chooses, and one that every row does.
    Apart(workers=(1, 3), recipe="mixtral-idle-expert", lanes=2),
    Apart(workers=(2, 2), recipe="mixtral-busy-expert", lanes=3),
    # Partial sums: other bits, the same tokens, since the answers are clear.
    Apart(workers=(2, 2), recipe="qwen3-moe-mixed", lanes=2, combine="sums"),
)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_tokens_equal_transformers(
    split: Apart, known: Callable[..., Known], answers: Callable[[str], Answers], tmp_path: Path
) -> None:
    expected = answers(split.recipe)
    num_attn, num_ffn = split.workers
    by_role = {"prefill": mesh_of(split.prefill), "attn": mesh_of(split.attn, lanes=split.lanes)}
    with (
        InProcessCluster(
            tmp_path,
            known(split.recipe).folder,
            ("prefill", *["attn"] * num_attn, *["ffn"] * num_ffn),
            orchestrator={"ffn_replicas": split.replicas},
            by_role=by_role,
            native_kernels=True,
            kv_cache_bytes=4 << 20,
            rank_processes=False,
            ffn_transport=split.transport,
            combine=split.combine,
            shared_expert=split.shared_expert,
        ) as cluster,
        Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client,
    ):
        routes = {completion.route for completion in check_all(client, expected)}
        assert {name for route in routes for name in route} <= {worker.config.name for worker in cluster.workers}
        assert all(len(route) == 2 and route[1].startswith("attn-") for route in routes)
        cluster.wait_idle()
        check_cached(client, expected, 16 * split.prefill[1])
        cluster.wait_idle()
        if split.recipe == "mixtral-idle-expert":
            rows = [load.num_rows for worker in cluster.workers if (load := worker.stats().ffn_load) is not None]
            assert (len(rows), rows.count(0)) == (3, 1)


@pytest.mark.parametrize("preemption", ["offload", "recompute"])
def test_those_that_give_way_go_on_where_they_were(
    preemption: str, known: Callable[..., Known], tmp_path: Path
) -> None:
    model = known("qwen2-moe-mixed")
    expected = dict(model.clear(length, 40) for length in (5, 9, 12, 20, 26, 31, 40, 44))
    # 12 blocks of 8 tokens hold one of the longer requests whole, and little beside it.
    small: dict[str, object] = {"kv_cache_bytes": 12 * model.block_bytes(8), "block_size": 8, "max_context": 88}
    with (
        InProcessCluster(
            tmp_path,
            model.folder,
            ("prefill", "attn", "ffn", "ffn"),
            by_role={"attn": {**small, "lanes": 3, "preemption": preemption}},
        ) as cluster,
        Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client,
    ):
        check_alike(client, expected)
        assert cluster.worker("attn-1").scheduler.num_preempted > 0  # type: ignore[attr-defined]
        cluster.wait_idle()


def test_beside_decode_and_colocated_workers(
    known: Callable[..., Known], answers: Callable[[str], Answers], tmp_path: Path
) -> None:
    with (
        InProcessCluster(
            tmp_path, known("mixtral").folder, ("prefill", "decode", "colocated", "attn", "ffn"), native_kernels=True
        ) as cluster,
        Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client,
    ):
        check_all(client, answers("mixtral"))
        cluster.wait_idle()


@pytest.mark.parametrize(
    ("recipe", "attn", "num_ffn", "transport"),
    [
        ("llama-gqa-tied", AttnPoolConfig(workers=2, lanes=2), 1, "tcp" if REASONS["ucx"] else "ucx"),
        ("qwen2-moe-mixed", AttnPoolConfig(lanes=3), 3, "shm"),
        ("mixtral", AttnPoolConfig(tp=2, lanes=2), 2, "auto"),
    ],
)
def test_processes(
    recipe: str,
    attn: AttnPoolConfig,
    num_ffn: int,
    transport: str,
    known: Callable[..., Known],
    answers: Callable[[str], Answers],
) -> None:
    small = {"threads": 1, "kv_cache_bytes": 4 << 20, "offload_bytes": 1 << 20}
    pools = Pools(
        prefill=PoolConfig(**small),
        attn=AttnPoolConfig(workers=attn.workers, tp=attn.tp, lanes=attn.lanes, **small),
        ffn=FfnPoolConfig(workers=num_ffn, threads=1),
    )
    topology = Topology(
        model=str(known(recipe).folder),
        dtype="float32",
        native_kernels=False,
        ffn_transport=transport,  # type: ignore[arg-type]
        pools=pools,
    )
    with LocalCluster(topology) as cluster, Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client:
        check_all(client, answers(recipe))
        assert [process.role for process in cluster.processes].count("ffn") == num_ffn
        assert cluster.deaths == ()


def test_every_value_is_covered() -> None:
    square = {(num_attn, num_ffn) for num_attn in (1, 2, 3) for num_ffn in (1, 2, 3)}
    assert {split.workers for split in SPLITS} == square | {(4, 1), (1, 4)}
    both = {(lanes, transport) for lanes in (1, 2, 3, 4) for transport in ("shm", "tcp")}
    assert both <= {(split.lanes, split.transport) for split in SPLITS}
    assert {split.replicas for split in SPLITS} == {0, 1, 2}
    assert {(2, 1), (1, 2), (2, 2)} <= {split.attn for split in SPLITS} & {split.prefill for split in SPLITS}
    for recipe in ("llama-gqa-tied", "mixtral", "qwen2-moe-mixed", "qwen3-moe-mixed"):
        assert {1, 2, 3, 4} <= {split.lanes for split in SPLITS if split.recipe == recipe}


@pytest.mark.parametrize("recipe", ["llama-gqa-tied", "qwen2-moe-mixed"])
def test_ffn_workers_of_several_ranks(
    recipe: str, known: Callable[..., Known], answers: Callable[[str], Answers], tmp_path: Path
) -> None:
    with (
        InProcessCluster(
            tmp_path,
            known(recipe).folder,
            ("prefill", "attn", "ffn", "ffn"),
            by_role={"ffn": {"tp": 2}, "attn": {"tp": 2, "lanes": 2}},
            native_kernels=True,
            kv_cache_bytes=4 << 20,
            rank_processes=False,
        ) as cluster,
        Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client,
    ):
        check_all(client, answers(recipe))
        cluster.wait_idle()
