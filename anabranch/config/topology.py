"""The topology file: which pools of workers serve which model."""

from __future__ import annotations

from typing import Literal

import msgspec

from anabranch.config.worker import DtypeName, Preemption
from anabranch.errors import ConfigError

KvTransport = Literal["auto", "inproc", "tcp", "ucx"]
RingChoice = Literal["auto", "pass_kv", "pass_q"]


class PoolConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pool of like workers.

    Attributes:
        workers: number of workers.
        tp, cp: tensor- and context-parallel degree of each worker.
        threads: compute threads of each rank; 0: an even share of the machine's cores.
        cores: CPU ids to pin the pool's workers to, dealt out evenly; empty: not pinned.
        kv_cache: size of the KV pool of each rank, in bytes or as text ("512MiB").
        offload: host memory of each rank for the KV of requests that give way when blocks run out, in bytes or as
            text; 0: none. Of decode and colocated pools.
        preemption: how requests give way: offload (to host memory, while there is room), recompute, or auto
            (whichever costs less time, as measured).
        max_running: most requests in one prefill step; where answers are generated, most requests at a time, and
            never more than max_step_tokens: each has its place in every step.
        max_step_tokens: most new tokens in one step (the chunk of chunked prefill).
        ring: what travels in ring attention (cp > 1): pass_kv, pass_q, or auto (by cost, step by step).
    """

    workers: int = 1
    tp: int = 1
    cp: int = 1
    threads: int = 0
    cores: tuple[int, ...] = ()
    kv_cache: int | str = "512MiB"
    offload: int | str = "256MiB"
    preemption: Preemption = "auto"
    max_running: int = 64
    max_step_tokens: int = 1024
    ring: RingChoice = "auto"


class Pools(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Either `prefill` and `decode`, or `colocated`, or all three."""

    prefill: PoolConfig | None = None
    decode: PoolConfig | None = None
    colocated: PoolConfig | None = None


class Topology(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole cluster on one machine.

    Attributes:
        model: a known name (`anabranch models`), a Hugging Face folder or a GGUF file.
        kv_transport: tensor plane between prefill and decode; inproc runs both in one process.
        step_programs: record each decode step's kernel calls once per batch size and repeat them as one call.
        schedule_ahead: while a worker's ranks compute a decode step, plan the next one and send it to them.
        max_context: most tokens of one request; 0: what the model and the pools allow.
        collective_timeout_s: longest wait of a worker's ranks for each other; then the worker ends.
        step_stall_s: longest time of one step of a worker; then the worker ends.
        grpc: address that the gateway listens on; port 0: chosen by the system.
    """

    model: str = "smollm2-135m"
    dtype: DtypeName = "auto"
    device: str = "cpu"
    kv_transport: KvTransport = "auto"
    block_size: int = 16
    prefix_cache: bool = True
    native_kernels: bool = True
    step_programs: bool = True
    schedule_ahead: bool = True
    max_context: int = 0
    collective_timeout_s: float = 30.0
    step_stall_s: float = 120.0
    grpc: str = "127.0.0.1:0"
    pools: Pools = msgspec.field(default_factory=lambda: Pools(prefill=PoolConfig(), decode=PoolConfig()))

    def __post_init__(self) -> None:
        pools = self.pools
        if (pools.prefill is None) != (pools.decode is None):
            missing = "prefill" if pools.prefill is None else "decode"
            raise ConfigError(f"pools.{missing}", None, "prefill and decode pools come together; add the other one")
        if pools.prefill is None and pools.colocated is None:
            raise ConfigError("pools", {}, "give prefill and decode, or colocated")
