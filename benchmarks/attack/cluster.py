"""The cluster that is attacked: real processes, a tiny model."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec

from anabranch.config.topology import PoolConfig, Pools, RestartConfig, Topology
from anabranch.model.identity import read_identity
from anabranch.model.sources import resolve_model
from anabranch.protocol.workers import WorkerInfo

VICTIMS = ("colocated-0", "decode-0")
"""Workers that are killed, in this order: after the first one the pair serves on, after the second nobody can."""


def topology(model: Path) -> Topology:
    """A worker of each role, with pools that are small enough to run out."""
    pool = PoolConfig(threads=1, kv_cache_bytes=2 << 20, offload_bytes=1 << 20)
    return Topology(
        model=str(model),
        dtype="float32",
        kv_transport="tcp",
        native_kernels=False,
        restart=RestartConfig(policy="never"),  # who is left is to go on
        pools=Pools(prefill=pool, decode=pool, colocated=pool),
    )


def prefill_info(model: Path, name: str) -> WorkerInfo:
    """What a prefill worker of this model registers as. Raises ModelError."""
    source = resolve_model(str(model))
    identity = read_identity(source, source.config())
    return WorkerInfo(
        name=name,
        role="prefill",
        pid=os.getpid(),
        host=socket.gethostname(),
        kv_dtype="float32",
        max_context=192,
        num_blocks=64,
        block_size=16,
        planes=("tcp",),
        device="cpu",
        num_threads=1,
        **msgspec.structs.asdict(identity),
    )
