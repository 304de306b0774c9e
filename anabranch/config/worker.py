"""What a worker process is told at its start: one frozen tree, from flags or from the launcher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from anabranch.config.bounds import Line, Seconds, Text
from anabranch.config.options import AttnOptions, ClusterOptions, FfnOptions, PoolOptions
from anabranch.config.orchestrator import check_secret_file
from anabranch.errors import ConfigError
from anabranch.protocol.workers import Role


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(PoolOptions, AttnOptions, FfnOptions, ClusterOptions):
    """Configuration of one worker; what its role has no use for is left alone.

    Attributes:
        role: prefill, decode, colocated, attn or ffn.
        name: unique in the cluster; appears in logs, routes and tables.
        orchestrator: address of the orchestrator's control channel, ipc://path or, with a secret_file, tcp://host:port.
        secret_file: file of mode 0600 with the orchestrator's secret; required with tcp://.
        listen_host: interface that tensor planes and FFN workers listen on.
        lease_s: a reservation that hears nothing for so long is aborted; covers the wait for prefill to begin.
        ack_timeout_s: longest wait of a prefill worker for the acknowledgement of a finished KV stream.
        heartbeat_s: time between beats.
        orchestrator_timeout_s: silence of the orchestrator after which the worker ends.
        collectives: what ranks sum with: shm (one host, CPU), gloo, nccl, or auto.
        rank_processes: give each rank a process of its own; without, all are threads of the worker's (CPU only).
    """

    role: Role
    name: Annotated[str, Text(100)]
    orchestrator: Line
    secret_file: Line = ""
    listen_host: Annotated[str, Text(255)] = "127.0.0.1"
    lease_s: Seconds = 60.0
    ack_timeout_s: Seconds = 10.0
    heartbeat_s: Seconds = 0.5
    orchestrator_timeout_s: Seconds = 10.0
    collectives: Literal["auto", "shm", "gloo", "nccl"] = "auto"
    rank_processes: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_order()
        check_secret_file("orchestrator", self.orchestrator, self.secret_file)
        if not self.name:
            raise ConfigError("name", self.name, "must have 1 to 100 characters")
        if self.role == "ffn" and self.cp != 1:
            raise ConfigError("cp", self.cp, "an ffn worker has no context to share out; leave it at 1, or raise tp")

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
        if self.role in ("decode", "attn") and self.num_ranks > 1 and self.lease_s < self.collective_timeout_s:
            raise ConfigError(
                "lease_s",
                self.lease_s,
                f"must not be below collective_timeout_s ({self.collective_timeout_s} s): a rank that it waits "
                "for is named before reservations are given up; raise the one or lower the other",
            )
        # A rank's rows may wait so long, and once more for the node that has them, while the others wait for it.
        waited_s = self.ffn_unavailable_s + self.ffn_timeout_s
        if self.role == "attn" and self.num_ranks > 1 and waited_s >= self.collective_timeout_s:
            raise ConfigError(
                "ffn_unavailable_s",
                self.ffn_unavailable_s,
                f"must with ffn_timeout_s ({self.ffn_timeout_s} s) be below collective_timeout_s "
                f"({self.collective_timeout_s} s): the ranks of {self.name} wait for each other",
            )

    @property
    def host_kv_bytes(self) -> int:
        """Host memory that each rank sets apart for KV: none where nothing is ever offloaded."""
        return 0 if self.role in ("prefill", "ffn") or self.preemption == "recompute" else self.offload_bytes

    def cores_of(self, rank: int) -> tuple[int, ...]:
        """The CPU ids of a rank: the worker's, dealt out evenly; all of them where there are too few."""
        share = len(self.cores) // self.num_ranks
        return self.cores[rank * share : (rank + 1) * share] if share else self.cores
