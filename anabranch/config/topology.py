"""The topology file: which pools of workers serve which model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, get_args

from anabranch.config.bounds import Between, is_port
from anabranch.config.options import ClusterOptions, PoolOptions
from anabranch.errors import ConfigError
from anabranch.protocol.workers import Role
from anabranch.system.hosts import is_loopback


def file_key(name: str) -> str:
    """An option's key in the file: without the unit of a size, which the value may have ("512MiB")."""
    return name.removesuffix("_bytes")


@dataclass(frozen=True, kw_only=True)
class PoolConfig(PoolOptions):
    """A pool of like workers.

    Attributes:
        workers: number of workers.
    """

    workers: Annotated[int, Between(1, 256)] = 1


@dataclass(frozen=True, kw_only=True)
class Pools:
    """Either `prefill` and `decode`, or `colocated`, or all three.

    Attributes:
        prefill: workers that compute prompts and stream the KV to decode workers; comes with `decode`.
        decode: workers that generate; comes with `prefill`.
        colocated: workers that do both; alone or beside the other two.
    """

    prefill: PoolConfig | None = None
    decode: PoolConfig | None = None
    colocated: PoolConfig | None = None

    def __post_init__(self) -> None:
        if (self.prefill is None) != (self.decode is None):
            missing = "prefill" if self.prefill is None else "decode"
            raise ConfigError(missing, None, "prefill and decode pools come together; add the other one")

    @property
    def by_role(self) -> dict[Role, PoolConfig]:
        """The pools that there are."""
        return {role: pool for role in get_args(Role) if (pool := getattr(self, role)) is not None}


@dataclass(frozen=True, kw_only=True)
class Topology(ClusterOptions):
    """A whole cluster on one machine.

    Attributes:
        grpc: address that the gateway listens on; port 0: chosen by the system.
        pools: which workers there are.
    """

    grpc: str = "127.0.0.1:0"
    pools: Pools = field(default_factory=lambda: Pools(prefill=PoolConfig(), decode=PoolConfig()))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pools.by_role:
            raise ConfigError("pools", {}, "give prefill and decode, or colocated")
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
