"""A worker's self-portrait for registration."""

from __future__ import annotations

import os
import socket

import msgspec
import torch

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine
from anabranch.model.identity import identity_of
from anabranch.protocol.workers import WorkerInfo


def worker_info(config: WorkerConfig, engine: Engine, planes: tuple[str, ...]) -> WorkerInfo:
    """What the orchestrator and operators are told about this worker."""
    return WorkerInfo(
        name=config.name,
        role=config.role,
        pid=os.getpid(),
        host=socket.gethostname(),
        kv_dtype=engine.layout.dtype,
        max_context=engine.max_context,
        num_blocks=engine.kv.num_blocks,
        block_size=engine.kv.block_size,
        planes=planes,
        device=str(engine.runner.device),
        num_threads=torch.get_num_threads(),
        tp=config.tp,
        cp=config.cp,
        **msgspec.structs.asdict(identity_of(config.model, engine.model_config)),
    )
