from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from anabranch.config.flags import parse_flags
from anabranch.config.load import check_topology
from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.config.topology import AttnPoolConfig, FfnPoolConfig, PoolConfig, Pools, Topology
from anabranch.config.worker import WorkerConfig
from launch.process_plan import plan_ffn_worker, plan_orchestrator, plan_processes, plan_workers

pytestmark = pytest.mark.unit

CONTROL = "ipc:///tmp/x/control.sock"


def split(prefill: PoolConfig, decode: PoolConfig, **rest: object) -> Topology:
    return msgspec.convert({"pools": Pools(prefill=prefill, decode=decode), **rest}, Topology)


def test_cores_are_shared_evenly() -> None:
    topology = split(PoolConfig(workers=1), PoolConfig(workers=2))
    workers = plan_workers(topology, CONTROL, cores=tuple(range(8)))
    assert [(w.name, w.threads, w.cores) for w in workers] == [
        ("prefill-0", 3, ()),
        ("decode-0", 3, ()),
        ("decode-1", 2, ()),
    ]


def test_more_workers_than_cores_get_one_thread_each() -> None:
    workers = plan_workers(split(PoolConfig(workers=2), PoolConfig(workers=2)), CONTROL, cores=(0, 1))
    assert [w.threads for w in workers] == [1, 1, 1, 1]


def test_pinned_cores_are_dealt_out_and_set_the_threads() -> None:
    topology = split(PoolConfig(workers=2, cores=(0, 1, 2, 3)), PoolConfig(cores=(4, 5), threads=1))
    workers = plan_workers(topology, CONTROL, cores=tuple(range(8)))
    assert [(w.cores, w.threads) for w in workers] == [((0, 1), 2), ((2, 3), 2), ((4, 5), 1)]


def test_a_worker_gets_what_the_topology_says() -> None:
    topology = check_topology(
        Topology(
            model="m",
            dtype="float32",
            kv_transport="tcp",
            block_size=32,
            prefix_cache=False,
            max_context=777,
            pools=Pools(colocated=PoolConfig(kv_cache_bytes=3 << 20, max_running=5, max_step_tokens=99, threads=1)),
        )
    )
    (worker,) = plan_workers(topology, CONTROL, secret_file=Path("/tmp/x/control.secret"))
    assert worker == WorkerConfig(
        role="colocated",
        name="colocated-0",
        orchestrator=CONTROL,
        secret_file="/tmp/x/control.secret",
        model="m",
        dtype="float32",
        kv_transport="tcp",
        threads=1,
        block_size=32,
        kv_cache_bytes=3 << 20,
        max_context=777,
        max_running=5,
        max_step_tokens=99,
        prefix_cache=False,
    )
    (process,) = plan_processes(topology, (worker,))
    assert process.module == "decode"
    assert parse_flags(WorkerConfig, process.arguments, prog="decode", about="") == worker


def test_one_process_for_each_worker() -> None:
    topology = split(PoolConfig(workers=2), PoolConfig(workers=1))
    processes = plan_processes(topology, plan_workers(topology, CONTROL))
    assert [(p.name, p.module) for p in processes] == [
        ("prefill-0", "prefill"),
        ("prefill-1", "prefill"),
        ("decode-0", "decode"),
    ]


def test_the_in_process_transport_shares_one_process() -> None:
    topology = split(PoolConfig(workers=1), PoolConfig(workers=2), kv_transport="inproc")
    workers = plan_workers(topology, CONTROL)
    (process,) = plan_processes(topology, workers)
    assert process.module == "launch.inproc"
    assert process.workers == workers
    assert process.arguments[0] == "--workers"
    assert msgspec.json.decode(process.arguments[1], type=tuple[WorkerConfig, ...]) == workers


def test_the_orchestrator_listens_where_the_topology_says() -> None:
    plan = plan_orchestrator(
        Topology(grpc="127.0.0.1:50051", model="m", tenant_weights=("gold=3", "free=0.5")),
        CONTROL,
        secret_file=Path("/tmp/x/control.secret"),
        admin_token_file=Path("/tmp/x/admin.token"),
        endpoints_file=Path("/tmp/x/endpoints.json"),
    )
    config = parse_flags(OrchestratorConfig, plan.arguments, prog="orchestrator", about="")
    assert config.model == "m"
    assert config.grpc_bind == "127.0.0.1:50051"
    assert config.control_bind == CONTROL
    assert config.tenant_weights == ("gold=3", "free=0.5")
    assert config.endpoints_file == "/tmp/x/endpoints.json"
    assert config.secret_file == "/tmp/x/control.secret"
    assert config.admin_token_file == "/tmp/x/admin.token"


def test_attention_and_ffn_workers_have_processes_of_their_own() -> None:
    pools = Pools(
        prefill=PoolConfig(),
        attn=AttnPoolConfig(workers=2, lanes=3),
        ffn=FfnPoolConfig(workers=2, replicas=2, capacity_bytes=1 << 30, merge_wait_us=7),
    )
    topology = Topology(pools=pools, row_exact="on", ffn_timeout_s=2.0)
    processes = plan_processes(topology, plan_workers(topology, CONTROL, cores=tuple(range(5))))
    assert [(p.name, p.module, p.num_threads) for p in processes] == [
        ("prefill-0", "prefill", 1),
        ("attn-0", "attn_nodes", 1),
        ("attn-1", "attn_nodes", 1),
        ("ffn-0", "ffn_nodes", 1),
        ("ffn-1", "ffn_nodes", 1),
    ]
    attn, ffn = (parse_flags(WorkerConfig, processes[n].arguments, prog="worker", about="") for n in (1, 3))
    assert (attn.role, attn.lanes, attn.row_exact, attn.ffn_timeout_s) == ("attn", 3, "on", 2.0)
    assert (ffn.role, ffn.capacity_bytes, ffn.merge_wait_us, ffn.row_exact) == ("ffn", 1 << 30, 7, "on")
    assert ffn.host_kv_bytes == 0
    # Who streams KV in one process, and FFN workers beside it.
    shared = replace(topology, kv_transport="inproc")
    processes = plan_processes(shared, plan_workers(shared, CONTROL))
    assert [p.name for p in processes] == ["inproc", "ffn-0", "ffn-1"]


def test_the_orchestrator_knows_how_many_ffn_workers_to_wait_for() -> None:
    def planned(topology: Topology) -> OrchestratorConfig:
        files = dict.fromkeys(("secret_file", "admin_token_file", "endpoints_file"), Path("/tmp/x"))
        plan = plan_orchestrator(topology, CONTROL, **files)
        return parse_flags(OrchestratorConfig, plan.arguments, prog="orchestrator", about="")

    pools = Pools(prefill=PoolConfig(), attn=AttnPoolConfig(), ffn=FfnPoolConfig(workers=3, replicas=0, rebalance_s=7))
    config = planned(Topology(pools=pools))
    assert (config.ffn_workers, config.ffn_replicas, config.ffn_rebalance_s) == (3, 0, 7)
    assert planned(Topology()).ffn_workers == 0


def test_ranks_get_no_more_threads_than_there_are_cores() -> None:
    topology = split(PoolConfig(tp=2), PoolConfig(cp=2))
    assert [w.threads for w in plan_workers(topology, CONTROL, cores=tuple(range(5)))] == [1, 1]
    assert [w.threads for w in plan_workers(topology, CONTROL, cores=tuple(range(6)))] == [2, 1]
    assert [w.threads for w in plan_workers(topology, CONTROL, cores=(0, 1))] == [1, 1]


def test_ranks_share_a_process_where_their_workers_do() -> None:
    topology = split(PoolConfig(tp=2, threads=1), PoolConfig(cp=3, threads=2), kv_transport="inproc")
    workers = plan_workers(topology, CONTROL)
    assert [w.rank_processes for w in workers] == [False, False]
    (process,) = plan_processes(topology, workers)
    assert process.num_threads == 2 * 1 + 3 * 2
    apart = plan_workers(split(PoolConfig(tp=2, threads=1), PoolConfig(cp=3, threads=2)), CONTROL)
    assert [w.rank_processes for w in apart] == [True, True]
    assert [p.num_threads for p in plan_processes(Topology(), apart)] == [1, 2]


def test_pinned_ranks_have_their_share_of_the_workers_cores() -> None:
    topology = split(PoolConfig(tp=2, cores=(0, 1, 2, 3)), PoolConfig())
    worker, _ = plan_workers(topology, CONTROL, cores=tuple(range(8)))
    assert (worker.threads, worker.cores_of(0), worker.cores_of(1)) == (2, (0, 1), (2, 3))
    assert plan_processes(topology, (worker,))[0].cores == (0, 1)


@pytest.mark.parametrize(
    ("num_devices", "devices"),
    [
        (8, ["cuda:0", "cuda:2", "cuda:4", "cuda:5"]),
        (4, ["cuda:0", "cuda:2", "cuda:0", "cuda:1"]),
        # Too few for a worker's ranks: said with the numbers when the mesh is checked.
        (1, ["cuda", "cuda", "cuda:0", "cuda:0"]),
        (0, ["cuda"] * 4),
    ],
)
def test_devices_are_dealt_out(num_devices: int, devices: list[str]) -> None:
    topology = split(PoolConfig(workers=2, tp=2), PoolConfig(workers=2), device="cuda")
    assert [w.device for w in plan_workers(topology, CONTROL, num_devices=num_devices)] == devices
    fixed = split(PoolConfig(), PoolConfig(), device="cuda:1")
    assert [w.device for w in plan_workers(fixed, CONTROL, num_devices=4)] == ["cuda:1", "cuda:1"]


@pytest.mark.parametrize(("index", "cores"), [(0, (0, 1)), (1, (2, 3)), (3, (3,))])
def test_an_ffn_worker_that_comes_later_is_as_one_of_a_pool_of_that_size(index: int, cores: tuple[int, ...]) -> None:
    pools = Pools(
        prefill=PoolConfig(),
        attn=AttnPoolConfig(),
        ffn=FfnPoolConfig(workers=2, replicas=2, cores=(0, 1, 2, 3), merge_wait_us=7),
    )
    topology = Topology(pools=pools, ffn_timeout_s=2.0)
    plan = plan_ffn_worker(topology, CONTROL, index, secret_file=Path("/tmp/secret"))
    assert (plan.name, plan.module, len(plan.workers)) == (f"ffn-{index}", "ffn_nodes", 1)
    assert plan.cores == cores
    config = parse_flags(WorkerConfig, plan.arguments, prog="worker", about="")
    assert (config.merge_wait_us, config.ffn_timeout_s, config.secret_file) == (7, 2.0, "/tmp/secret")
    assert config.threads == len(cores)
    if index < 2:
        assert (
            plan
            == plan_processes(topology, plan_workers(topology, CONTROL, secret_file=Path("/tmp/secret")))[2 + index]
        )
