"""A worker's self-portrait for registration."""

from __future__ import annotations

import os
import secrets
import socket

import msgspec
import torch

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine
from anabranch.model.config import ModelConfig
from anabranch.model.identity import identity_of
from anabranch.protocol.ffn import Addresses
from anabranch.protocol.workers import WorkerInfo


def worker_info(config: WorkerConfig, engine: Engine, planes: tuple[str, ...]) -> WorkerInfo:
    """What the orchestrator and operators are told about a worker that holds KV."""
    return msgspec.structs.replace(
        _without_kv(config, engine.model_config, engine.layout.dtype, str(engine.runner.device)),
        max_context=engine.max_context,
        num_blocks=engine.kv.num_blocks,
        block_size=engine.kv.block_size,
        planes=planes,
    )


def ffn_worker_info(
    config: WorkerConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, addresses: Addresses
) -> WorkerInfo:
    """What they are told about one that holds none; each call is of another incarnation."""
    return msgspec.structs.replace(
        _without_kv(config, model, str(dtype).removeprefix("torch."), str(device)),
        addresses=addresses,
        incarnation=secrets.randbits(63),
        capacity_bytes=config.capacity_bytes,
        shared_experts=config.shared_expert == "ffn",
    )


def _without_kv(config: WorkerConfig, model: ModelConfig, dtype: str, device: str) -> WorkerInfo:
    return WorkerInfo(
        name=config.name,
        role=config.role,
        pid=os.getpid(),
        host=socket.gethostname(),
        kv_dtype=dtype,
        max_context=0,
        num_blocks=0,
        block_size=config.block_size,
        planes=(),
        device=device,
        num_threads=torch.get_num_threads(),
        tp=config.tp,
        cp=config.cp,
        heartbeat_s=config.heartbeat_s,
        step_stall_s=config.step_stall_s,
        **msgspec.structs.asdict(identity_of(config.model, model)),
    )
