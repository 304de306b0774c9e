"""What a worker process is told at its start: one frozen tree, from flags or from the launcher."""

from __future__ import annotations

from typing import Literal

import msgspec

from anabranch.config.bounds import check_count
from anabranch.config.orchestrator import check_secret_file
from anabranch.errors import ConfigError
from anabranch.protocol.workers import Role

DtypeName = Literal["float32", "bfloat16", "float16", "auto"]
Preemption = Literal["auto", "recompute", "offload"]


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Configuration of one prefill, decode or colocated worker.

    Attributes:
        role: prefill, decode or colocated.
        name: unique in the cluster; appears in logs, routes and tables.
        orchestrator: address of the orchestrator's control channel, ipc://path or, with a secret_file, tcp://host:port.
        secret_file: file of mode 0600 with the orchestrator's secret; required with tcp://.
        model: a known name, a Hugging Face folder or a GGUF file.
        dtype: of weights, activations and KV; auto: bfloat16 where the device is fast at it.
        device: cpu, cuda, cuda:0, ...
        kv_transport: tensor plane for KV: inproc, tcp, ucx, or auto (best that both ends have).
        threads: compute threads of each rank; 0: all cores that the process may use.
        cores: CPU ids to pin to, dealt out among the ranks; empty: not pinned.
        block_size: tokens per KV block.
        kv_cache_bytes: size of the KV pool of each rank.
        max_context: most tokens of one request; 0: what the model and the pool allow.
        offload_bytes: host memory of each rank for the KV of requests that give way when blocks run out, so that
            they go on later without computing it again; 0: none. Taken by decode and colocated workers.
        preemption: how requests give way: offload (to host memory, while there is room), recompute (a decode worker
            sends them back to prefill), or auto (whichever costs less time, as measured).
        max_running: most requests in one prefill step; where answers are generated, most requests at a time that
            hold KV blocks or have given way, and never more than max_step_tokens: each has its place in every step.
        max_step_tokens: most new tokens in one step; longer prompts are computed in chunks.
        prefix_cache: keep finished requests' full blocks for prompts that begin alike.
        listen_host: interface that tensor planes listen on.
        lease_s: a reservation that hears nothing for so long is aborted; covers the wait for prefill to begin.
        ack_timeout_s: longest wait of a prefill worker for the acknowledgement of a finished KV stream.
        heartbeat_s: time between beats.
        orchestrator_timeout_s: silence of the orchestrator after which the worker ends.
        native_kernels: use compiled kernels where they can be had: C++ on cpu, FlexAttention on cuda; false:
            PyTorch operations.
        step_programs: record each decode step's kernel calls once per batch size and repeat them as one call; same
            tokens, less time per token. Needs native kernels; with cp above 1 steps are not recorded.
        schedule_ahead: while the ranks compute a decode step, plan the next one and send it to them.
        tp, cp: tensor- and context-parallel degree; the worker has tp x cp ranks, one process each.
        ring: what travels in ring attention (cp > 1): pass_kv, pass_q, or auto (by cost, step by step).
        collectives: what ranks sum with: shm (one host, CPU), gloo, nccl, or auto.
        collective_timeout_s: longest wait of a rank for the others.
        step_stall_s: longest time that one step, or anything else that the worker's threads do in one piece, may take;
            then the worker ends.
        rank_processes: give each rank a process of its own; without, all are threads of the worker's (CPU only).
    """

    role: Role
    name: str
    orchestrator: str
    model: str
    secret_file: str = ""
    dtype: DtypeName = "auto"
    device: str = "cpu"
    kv_transport: str = "auto"
    threads: int = 0
    cores: tuple[int, ...] = ()
    block_size: int = 16
    kv_cache_bytes: int = 512 * 1024 * 1024
    offload_bytes: int = 256 * 1024 * 1024
    preemption: Preemption = "auto"
    max_context: int = 0
    max_running: int = 64
    max_step_tokens: int = 1024
    prefix_cache: bool = True
    listen_host: str = "127.0.0.1"
    lease_s: float = 60.0
    ack_timeout_s: float = 10.0
    heartbeat_s: float = 0.5
    orchestrator_timeout_s: float = 10.0
    native_kernels: bool = True
    step_programs: bool = True
    schedule_ahead: bool = True
    tp: int = 1
    cp: int = 1
    ring: Literal["auto", "pass_kv", "pass_q"] = "auto"
    collectives: Literal["auto", "shm", "gloo", "nccl"] = "auto"
    collective_timeout_s: float = 30.0
    step_stall_s: float = 120.0
    rank_processes: bool = True

    def __post_init__(self) -> None:
        for key in ("block_size", "kv_cache_bytes", "max_running", "max_step_tokens", "tp", "cp"):
            check_count(key, getattr(self, key), 1)
        for key in ("threads", "max_context", "offload_bytes"):
            check_count(key, getattr(self, key), 0)
        for core in self.cores:
            check_count("cores", core, 0)
        if self.preemption == "offload" and self.offload_bytes == 0:
            raise ConfigError("preemption", self.preemption, "needs host memory; give offload_bytes, or choose auto")
        for key in self.__struct_fields__:
            if key.endswith("_s") and not 0.0 < getattr(self, key) < 86400.0:
                raise ConfigError(key, getattr(self, key), "must be above 0 and below 86400 seconds")
        self._check_order()
        check_secret_file("orchestrator", self.orchestrator, self.secret_file)
        if not self.name or len(self.name) > 100:
            raise ConfigError("name", self.name, "must have 1 to 100 characters")

    def _check_order(self) -> None:
        """What takes longer must be given longer, or the wrong one is blamed."""
        if self.orchestrator_timeout_s < 2 * self.heartbeat_s:
            raise ConfigError(
                "orchestrator_timeout_s",
                self.orchestrator_timeout_s,
                f"must be at least two beats ({2 * self.heartbeat_s} s)",
            )
        longer = "heartbeat_s" if self.num_ranks == 1 else "collective_timeout_s"
        if self.step_stall_s <= getattr(self, longer):
            raise ConfigError("step_stall_s", self.step_stall_s, f"must be above {longer} ({getattr(self, longer)} s)")

    @property
    def host_kv_bytes(self) -> int:
        """Host memory that each rank sets apart for KV: none where nothing is ever parked."""
        return 0 if self.role == "prefill" or self.preemption == "recompute" else self.offload_bytes

    @property
    def num_ranks(self) -> int:
        return self.tp * self.cp

    def cores_of(self, rank: int) -> tuple[int, ...]:
        """The CPU ids of a rank: the worker's, dealt out evenly; all of them where there are too few."""
        share = len(self.cores) // self.num_ranks
        return self.cores[rank * share : (rank + 1) * share] if share else self.cores
