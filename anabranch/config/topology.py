"""The topology file: which pools of workers serve which model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, get_args

from anabranch.config.bounds import Between, Options, is_port
from anabranch.config.options import AttnOptions, ClusterOptions, FfnOptions, PoolOptions, RankOptions, RestartPolicy
from anabranch.config.tenants import TenantWeights, parse_tenant_weights
from anabranch.errors import ConfigError
from anabranch.parallel.mesh import Mesh
from anabranch.protocol.workers import Role
from anabranch.system.hosts import is_loopback


def file_key(name: str) -> str:
    """An option's key in the file: without the unit of a size, which the value may have ("512MiB")."""
    return name.removesuffix("_bytes")


@dataclass(frozen=True, kw_only=True)
class WorkerCount(Options):
    """What every pool has.

    Attributes:
        workers: number of workers.
    """

    workers: Annotated[int, Between(1, 256)] = 1


@dataclass(frozen=True, kw_only=True)
class PoolConfig(WorkerCount, PoolOptions):
    """A pool of like workers that are given requests."""


@dataclass(frozen=True, kw_only=True)
class AttnPoolConfig(PoolConfig, AttnOptions):
    """A pool of like workers that generate with FFN workers."""


@dataclass(frozen=True, kw_only=True)
class FfnPoolConfig(WorkerCount, RankOptions, FfnOptions):
    """A pool of like workers that keep FFNs and experts, and are given rows instead of requests.

    Attributes:
        replicas: FFN workers that hold each expert, so that the others go on at once where one is lost; 0: all do.
        rebalance_s: shortest time between two moves of experts to workers that have less to do; 0: experts never move
            for the load's sake.
    """

    replicas: Annotated[int, Between(0, 256)] = 1
    rebalance_s: Annotated[int, Between(0, 86400, "seconds")] = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        Mesh(tp=self.tp)
        if self.replicas > self.workers:
            raise ConfigError(
                "replicas", self.replicas, f"must be at most the pool's {self.workers} workers; 0: on all of them"
            )


AnyPoolConfig = PoolConfig | FfnPoolConfig


@dataclass(frozen=True, kw_only=True)
class Pools:
    """`prefill` and who generates (`decode`, `attn` with `ffn`, or both), or `colocated`, or all of them.

    Attributes:
        prefill: workers that compute prompts and stream the KV to those that generate; comes with `decode` or `attn`.
        decode: workers that generate; comes with `prefill`.
        colocated: workers that do both; alone or beside the others.
        attn: workers that generate and keep no FFN; comes with `prefill` and `ffn`.
        ffn: workers that compute the FFNs of `attn` workers; comes with `attn`.
    """

    prefill: PoolConfig | None = None
    decode: PoolConfig | None = None
    colocated: PoolConfig | None = None
    attn: AttnPoolConfig | None = None
    ffn: FfnPoolConfig | None = None

    def __post_init__(self) -> None:
        if (self.attn is None) != (self.ffn is None):
            missing = "attn" if self.attn is None else "ffn"
            raise ConfigError(missing, None, "attn and ffn pools come together; add the other one")
        generating = "decode" if self.attn is None else "attn"
        if self.prefill is None and (self.decode is not None or self.attn is not None):
            raise ConfigError("prefill", None, f"prefill and {generating} pools come together; add the other one")
        if self.prefill is not None and self.decode is None and self.attn is None:
            raise ConfigError("decode", None, "prefill and decode pools come together; add decode, or attn and ffn")

    @property
    def by_role(self) -> dict[Role, AnyPoolConfig]:
        """The pools that there are."""
        return {role: pool for role in get_args(Role) if (pool := getattr(self, role)) is not None}


@dataclass(frozen=True, kw_only=True)
class RestartConfig(Options):
    """What becomes of a worker whose process died; one that was drained stays away.

    Attributes:
        policy: whether it is started again, under its name, after 0.5 to 30 s, twice as long after each death in a row.
        max_per_10min: starts of one worker within 10 minutes, after which it stays away.
    """

    policy: RestartPolicy = "on_failure"
    max_per_10min: Annotated[int, Between(1, 1000)] = 20


@dataclass(frozen=True, kw_only=True)
class Topology(ClusterOptions):
    """A whole cluster on one machine.

    Attributes:
        grpc: address that the gateway listens on; port 0: chosen by the system.
        tenant_weights: NAME=WEIGHT of tenants that are served more or less than others, whose weight is 1.
        pools: which workers there are.
        restart: what becomes of a worker that died.
    """

    grpc: str = "127.0.0.1:0"
    tenant_weights: TenantWeights = ()
    pools: Pools = field(default_factory=lambda: Pools(prefill=PoolConfig(), decode=PoolConfig()))
    restart: RestartConfig = field(default_factory=RestartConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_tenant_weights(self.tenant_weights)
        if not self.pools.by_role:
            raise ConfigError("pools", {}, "give prefill and decode, prefill, attn and ffn, or colocated")
        if self.step_stall_s <= self.collective_timeout_s:
            remedy = f"must be above collective_timeout_s ({self.collective_timeout_s} s)"
            raise ConfigError("step_stall_s", self.step_stall_s, remedy)
        host, _, port = self.grpc.rpartition(":")
        if not host or not is_port(port):
            remedy = "give HOST:PORT, such as 127.0.0.1:50051 (port 0: chosen by the system)"
            raise ConfigError("grpc", self.grpc, remedy)
        if not is_loopback(host):
            remedy = "is reachable from other machines and there is no TLS; use 127.0.0.1"
            raise ConfigError("grpc", self.grpc, remedy)
