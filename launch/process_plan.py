"""Which processes a topology means on this machine: a pure function, so that it can be looked at and tested."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import msgspec

from anabranch.config.flags import to_flags
from anabranch.config.load import usable_cores
from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.config.topology import Topology
from anabranch.config.worker import WorkerConfig
from anabranch.protocol.workers import Role

ORCHESTRATOR_NAME = "orchestrator"
INPROC_NAME = "inproc"
_MODULES: dict[Role, str] = {
    "prefill": "prefill",
    "decode": "decode",
    "colocated": "decode",
    "attn": "attn_nodes",
    "ffn": "ffn_nodes",
}


@dataclass(frozen=True, kw_only=True)
class ProcessPlan:
    """One process to start.

    Attributes:
        name: unique in the cluster.
        module: what `python -m` runs.
        arguments: its command line.
        workers: workers that live in it (several where prefill and decode share a process).
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    workers: tuple[WorkerConfig, ...]

    @property
    def num_threads(self) -> int:
        """Compute threads of this process, without those of ranks that have their own."""
        return sum(worker.threads * (1 if worker.rank_processes else worker.num_ranks) for worker in self.workers)

    @property
    def cores(self) -> tuple[int, ...]:
        """CPU ids that this process is pinned to; none: it is not."""
        pinned = (w.cores_of(0) if w.rank_processes else w.cores for w in self.workers)
        return tuple(sorted({core for cores in pinned for core in cores}))


def plan_orchestrator(
    topology: Topology, control: str, *, secret_file: Path, admin_token_file: Path, endpoints_file: Path
) -> ProcessPlan:
    """The orchestrator; it writes its address to `endpoints_file` once it listens."""
    ffn = topology.pools.ffn
    ffn_options: dict[str, Any] = {}
    if ffn is not None:
        ffn_options = {
            "ffn_workers": ffn.workers,
            "ffn_replicas": ffn.replicas,
            "ffn_rebalance_s": ffn.rebalance_s,
        }
    config = OrchestratorConfig(
        model=topology.model,
        grpc_bind=topology.grpc,
        tenant_weights=topology.tenant_weights,
        control_bind=control,
        secret_file=str(secret_file),
        admin_token_file=str(admin_token_file),
        endpoints_file=str(endpoints_file),
        **ffn_options,
    )
    return ProcessPlan(name=ORCHESTRATOR_NAME, module="orchestrator", arguments=tuple(to_flags(config)), workers=())


def plan_workers(
    topology: Topology,
    control: str,
    *,
    secret_file: Path | None = None,
    cores: tuple[int, ...] | None = None,
    num_devices: int | None = None,
) -> tuple[WorkerConfig, ...]:
    """The workers of a checked topology, threads, cores and devices dealt out.

    Args:
        control: endpoint of the orchestrator's control channel.
        secret_file: holds the secret that its two ends prove to each other; None: there is none.
        cores: CPU ids that may be used; None: those of this process.
        num_devices: accelerators that may be used; None: those that are visible.
    """
    usable = usable_cores() if cores is None else cores
    pools = topology.pools.by_role
    num_ranks = sum(pool.workers * pool.num_ranks for pool in pools.values())
    share, spare = divmod(len(usable), num_ranks)
    devices = _Devices(topology.device, num_devices)
    workers: list[WorkerConfig] = []
    for role, pool in pools.items():
        ranks = pool.num_ranks
        num_cores = len(pool.cores) // pool.workers
        for index in range(pool.workers):
            own = pool.cores[index * num_cores : (index + 1) * num_cores]
            more = 1 if spare >= ranks else 0
            spare -= more * ranks
            options = _worker_options(topology) | _worker_options(pool)
            options["device"] = devices.take(ranks)
            options["threads"] = pool.threads or max(1, len(own) // ranks if own else share + more)
            options["cores"] = own
            workers.append(
                WorkerConfig(
                    **options,
                    role=role,
                    name=f"{role}-{index}",
                    orchestrator=control,
                    secret_file=str(secret_file or ""),
                    # What shares memory shares a process.
                    rank_processes=not _shares_process(topology, role),
                )
            )
    return tuple(workers)


def plan_ffn_worker(topology: Topology, control: str, index: int, *, secret_file: Path | None = None) -> ProcessPlan:
    """An FFN worker that is started later, as a pool of at least `index + 1` would have it; see `plan_workers`."""
    assert topology.pools.ffn is not None
    pool = replace(topology.pools.ffn, workers=max(topology.pools.ffn.workers, index + 1))
    grown = replace(topology, pools=replace(topology.pools, ffn=pool))
    workers = plan_workers(grown, control, secret_file=secret_file)
    return plan_processes(grown, tuple(worker for worker in workers if worker.name == f"ffn-{index}"))[0]


def plan_processes(topology: Topology, workers: tuple[WorkerConfig, ...]) -> tuple[ProcessPlan, ...]:
    """One process for each worker; with the in-process transport, one for all prefill and decode workers."""
    shared = tuple(worker for worker in workers if _shares_process(topology, worker.role))
    processes: list[ProcessPlan] = []
    if shared:
        text = msgspec.json.encode(shared).decode()
        processes.append(
            ProcessPlan(name=INPROC_NAME, module="launch.inproc", arguments=("--workers", text), workers=shared)
        )
    processes.extend(
        ProcessPlan(
            name=worker.name, module=_MODULES[worker.role], arguments=tuple(to_flags(worker)), workers=(worker,)
        )
        for worker in workers
        if worker not in shared
    )
    return tuple(processes)


def _shares_process(topology: Topology, role: Role) -> bool:
    """Whether workers of a role live in one process with those that they give KV to, or take it from."""
    return topology.kv_transport == "inproc" and role in ("prefill", "decode", "attn")


def _worker_options(source: object) -> dict[str, Any]:
    """The values of those options of a topology or pool that a worker goes by."""
    known = {field.name for field in fields(WorkerConfig)}
    return {field.name: getattr(source, field.name) for field in fields(cast(Any, source)) if field.name in known}


class _Devices:
    """Deals accelerators out to workers, a run of them to each; workers share them where there are too few."""

    def __init__(self, device: str, num_devices: int | None) -> None:
        self._device = device
        self._next = 0
        self._count = 0
        if device == "cuda":
            self._count = _visible_devices() if num_devices is None else num_devices

    def take(self, num_ranks: int) -> str:
        """The first of a worker's devices; what was configured where it names one, or there is nothing to deal."""
        if num_ranks > self._count:
            return self._device
        first = self._next if self._next + num_ranks <= self._count else 0
        self._next = first + num_ranks
        return f"{self._device}:{first}"


def _visible_devices() -> int:
    import torch  # not needed to start workers on the cpu

    return torch.cuda.device_count()
