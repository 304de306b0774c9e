"""Every option is declared in one place, with its default, its bounds and its reason."""

from __future__ import annotations

import ast
import typing
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest

import anabranch.config
from anabranch.config.bounds import bounds_of
from anabranch.config.flags import attribute_help, parse_flags, to_flags
from anabranch.config.load import topology_from
from anabranch.config.options import AttnOptions, ClusterOptions, FfnOptions, PoolOptions, RankOptions
from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.config.topology import AttnPoolConfig, FfnPoolConfig, PoolConfig, Topology, file_key
from anabranch.config.worker import WorkerConfig
from anabranch.errors import ConfigError
from launch.process_plan import plan_workers

pytestmark = pytest.mark.unit

ALL = (Topology, PoolConfig, AttnPoolConfig, FfnPoolConfig, WorkerConfig, OrchestratorConfig)
# Another value than the default, for each option that a topology gives to workers.
OTHER: dict[str, object] = {
    "model": "m",
    "dtype": "float32",
    "device": "cuda:1",
    "kv_transport": "tcp",
    "block_size": 32,
    "prefix_cache": False,
    "native_kernels": False,
    "step_programs": False,
    "schedule_ahead": False,
    "max_context": 777,
    "collective_timeout_s": 5.0,
    "step_stall_s": 50.0,
    "tp": 2,
    "cp": 3,
    "threads": 7,
    "cores": (),
    "kv_cache_bytes": 3 << 20,
    "offload_bytes": 2 << 20,
    "preemption": "recompute",
    "max_running": 5,
    "max_step_tokens": 99,
    "ring": "pass_q",
    "ffn_transport": "tcp",
    "row_exact": "off",
    "combine": "sums",
    "shared_expert": "ffn",
    "ffn_timeout_s": 1.5,
    "ffn_unavailable_s": 3.0,
    "lanes": 3,
    "capacity_bytes": 1 << 30,
    "merge_wait_us": 50,
}
# Role -> the classes that declare what its workers are given.
DECLARED: dict[str, tuple[type, ...]] = {
    "colocated": (ClusterOptions, PoolOptions),
    "attn": (ClusterOptions, PoolOptions, AttnOptions),
    "ffn": (ClusterOptions, RankOptions, FfnOptions),
}


def names(options: type) -> set[str]:
    return {field.name for field in fields(options)}  # type: ignore[arg-type]


def test_an_option_of_a_topology_is_declared_once() -> None:
    declared = Counter(
        node.target.id
        for path in Path(anabranch.config.__path__[0]).glob("*.py")
        if path.stem != "orchestrator"  # a process of another kind
        for body in ast.walk(ast.parse(path.read_text()))
        if isinstance(body, ast.ClassDef)
        for node in body.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )
    shared = set().union(*(names(options) for declared in DECLARED.values() for options in declared))
    assert {name: declared[name] for name in shared} == dict.fromkeys(shared, 1)
    pools = names(PoolConfig) | names(AttnPoolConfig) | names(FfnPoolConfig)
    assert shared == names(WorkerConfig) & (names(Topology) | pools)
    assert shared == set(OTHER)


@pytest.mark.parametrize("role", DECLARED)
def test_a_topology_gives_workers_every_option(role: str) -> None:
    """Whoever adds an option to a shared class has nothing to copy."""
    cluster = {file_key(name): OTHER[name] for name in names(ClusterOptions)}
    given = set().union(*(names(options) for options in DECLARED[role]))
    pool = {file_key(name): OTHER[name] for name in given - names(ClusterOptions)}
    pools: dict[str, object] = {"prefill": {}, "attn": {}, "ffn": {}, role: pool}
    workers = plan_workers(topology_from({**cluster, "pools": pools}), "ipc://x", cores=(0,))
    (worker,) = (worker for worker in workers if worker.role == role)
    assert {name: getattr(worker, name) for name in given} == {name: OTHER[name] for name in given}
    assert parse_flags(WorkerConfig, to_flags(worker), prog="decode", about="") == worker


@pytest.mark.parametrize("options", ALL)
def test_every_option_is_told_and_every_number_is_bounded(options: type) -> None:
    helps, bounds = attribute_help(options), bounds_of(options)
    hints = typing.get_type_hints(options)
    for name in names(options):
        assert helps.get(name), name
        if hints[name] in (int, float) or hints[name] == tuple[int, ...]:
            assert name in bounds, name


@pytest.mark.parametrize(("name", "value"), [("model", ""), ("model", "a\0b"), ("device", "x" * 101), ("tp", 65)])
def test_a_worker_is_bounded_as_its_topology_is(name: str, value: object) -> None:
    config = WorkerConfig(role="decode", name="decode-0", orchestrator="ipc://x")
    with pytest.raises(ConfigError, match=f"^{name}"):
        replace(config, **{name: value})  # type: ignore[arg-type]
    data: dict[str, object] = {name: value} if name in names(ClusterOptions) else {"colocated": {name: value}}
    with pytest.raises(ConfigError, match=f"^(pools.colocated.)?{name}"):
        topology_from(data)
