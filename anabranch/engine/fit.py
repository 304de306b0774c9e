"""Whether workers fit the model and the machine: heads, devices, memory. Asked before anything is started."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from anabranch.config.load import usable_cores
from anabranch.config.worker import WorkerConfig
from anabranch.engine.device import resolve_device, resolve_dtype
from anabranch.errors import ConfigError
from anabranch.model.config import ModelConfig
from anabranch.model.size import (
    attention_bytes,
    shared_features,
    smallest_ffn,
    smallest_held,
    weight_bytes,
)
from anabranch.parallel.layout import KvLayout
from anabranch.parallel.mesh import Mesh, check_model, rank_devices

logger = logging.getLogger(__name__)

# What a process that has imported torch and the tensor planes keeps to itself.
PROCESS_BYTES = 160 << 20
_CGROUP = Path("/sys/fs/cgroup")


def kv_layout(config: WorkerConfig, model: ModelConfig) -> KvLayout:
    """How the worker spreads KV over its ranks."""
    dtype = resolve_dtype(config.dtype, resolve_device(config.device))
    return KvLayout(
        dtype=str(dtype).removeprefix("torch."),
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=config.block_size,
        tp=config.tp,
        cp=config.cp,
    )


def num_kv_blocks(config: WorkerConfig, layout: KvLayout) -> int:
    """Blocks of every rank's pool: those that fit the rank with the most heads. Raises ConfigError where none does."""
    num_blocks = config.kv_cache_bytes // block_bytes(layout)
    if num_blocks < 1:
        raise ConfigError(
            "kv_cache_bytes", config.kv_cache_bytes, f"must hold one block of {block_bytes(layout)} bytes"
        )
    return num_blocks


def num_host_blocks(config: WorkerConfig, layout: KvLayout) -> int:
    """Blocks that every rank keeps in host memory; 0 where none are wanted. Raises ConfigError where none fits."""
    num_blocks = config.host_kv_bytes // block_bytes(layout)
    if config.host_kv_bytes and num_blocks < 1:
        raise ConfigError(
            "offload_bytes", config.offload_bytes, f"must hold one block of {block_bytes(layout)} bytes, or be 0"
        )
    return num_blocks


def block_bytes(layout: KvLayout) -> int:
    """Bytes of one block of the rank with the most heads."""
    head_bytes = 2 * layout.num_layers * layout.head_dim * layout.element_bytes * layout.block_size
    return head_bytes * max(len(layout.heads_of(tp_rank)) for tp_rank in range(layout.tp))


def rank_config(config: WorkerConfig, rank: int) -> WorkerConfig:
    """A worker's configuration as one of its ranks goes by it: on its own device, cores and threads.

    Raises:
        ConfigError: fewer accelerators than ranks.
    """
    even = max(1, len(config.cores or usable_cores()) // config.num_ranks)
    return replace(config, device=_devices(config)[rank], cores=config.cores_of(rank), threads=config.threads or even)


def check_worker(config: WorkerConfig, model: ModelConfig) -> None:
    """Raise ConfigError where the model cannot be cut so, a rank has no device, or a pool holds no block."""
    mesh = Mesh(tp=config.tp, cp=config.cp)
    num_heads, num_features = _cuts(config, model)
    check_model(mesh, num_heads=num_heads, intermediate_size=num_features)
    devices = _devices(config)
    if not config.rank_processes and devices[0] != "cpu":
        raise ConfigError("device", config.device, "ranks that are threads of one process compute on the cpu")
    if config.role == "ffn":
        return
    _check_context(config, model, kv_layout(config, model))
    num_host_blocks(config, kv_layout(config, model))


def _cuts(config: WorkerConfig, model: ModelConfig) -> tuple[int, int]:
    """Query heads and FFN features, of the narrowest FFN, that a worker's TP ranks share; its tp where it has none."""
    if config.role == "ffn":
        return config.tp, smallest_held(model, shared=config.shared_expert == "ffn")
    if config.role == "attn":
        return model.num_heads, (shared_features(model) if config.shared_expert == "attn" else 0) or config.tp
    return model.num_heads, smallest_ffn(model)


def _check_context(config: WorkerConfig, model: ModelConfig, layout: KvLayout) -> None:
    """Raise ConfigError where the pool holds no block, or not the context that was asked for; warn of the model's."""
    asked = min(config.max_context, model.max_context)
    if config.max_context > model.max_context:
        logger.warning(
            "max_context: %d is more than the model's context of %d tokens, which is what %s serves",
            config.max_context,
            model.max_context,
            config.name,
        )
    num_blocks = num_kv_blocks(config, layout)
    num_tokens = num_blocks * config.block_size * config.cp
    if asked > num_tokens:
        needed = -(-asked // (config.block_size * config.cp)) * block_bytes(layout)
        cp = -(-asked // (num_blocks * config.block_size))
        raise ConfigError(
            "max_context",
            config.max_context,
            f"does not fit the KV pool: {num_blocks} blocks of {config.block_size} tokens on each of {config.cp} CP "
            f"ranks hold {num_tokens}; raise kv_cache to {_text(needed)}, or cp to {cp}, or lower it",
        )


def check_memory(workers: Sequence[WorkerConfig], model: ModelConfig, ffn_shares: Mapping[str, int]) -> None:
    """Raise ConfigError, with the numbers, where the workers together need more memory than is free.

    Args:
        ffn_shares: name of an ffn worker -> bytes of its experts, all ranks together; none: not known here.
    """
    needs: dict[str, dict[str, list[_Need]]] = defaultdict(lambda: defaultdict(list))
    for config in workers:
        weights = _weights(config, model, ffn_shares)
        kv = 0 if config.role == "ffn" else config.kv_cache_bytes
        for device in _devices(config):
            process = PROCESS_BYTES if device == "cpu" else 0
            offloaded = config.host_kv_bytes if device == "cpu" else 0
            needs[device][config.name].append(_Need(weights=weights, kv=kv, offloaded=offloaded, process=process))
            if device != "cpu" and config.host_kv_bytes:
                in_host = _Need(weights=0, kv=0, offloaded=config.host_kv_bytes, process=0)
                needs["cpu"][config.name].append(in_host)
    for device, by_name in needs.items():
        needed = sum(sum(need) for ranks in by_name.values() for need in ranks)
        free = available_bytes(device)
        if needed > free:
            who = ", ".join(f"{name} {len(ranks)} x ({ranks[0]})" for name, ranks in by_name.items())
            raise ConfigError(
                "memory",
                _text(needed),
                f"would be needed on {device}, but {_text(free)} are free: {who}; "
                "lower kv_cache or offload, or the number of ranks or workers",
            )


def _weights(config: WorkerConfig, model: ModelConfig, ffn_shares: Mapping[str, int]) -> int:
    """Bytes of the weights of the rank that holds most."""
    if config.role == "ffn":
        return -(-ffn_shares.get(config.name, 0) // config.tp)
    dtype = kv_layout(config, model).dtype
    if config.role == "attn":
        ranks = range(config.tp)
        here = config.shared_expert == "attn"
        return max(
            attention_bytes(model, dtype, config.tp, rank, shared_experts=here, shared_gates=not here) for rank in ranks
        )
    return weight_bytes(model, dtype, config.tp)


def available_bytes(device: str) -> int:
    """Memory that can still be had on a device: of this machine, or of what this container may use of it."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    free = psutil.virtual_memory().available
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or one without a limit
        return int(free)
    # Cached files count as used, though the kernel takes them back when memory is asked for.
    return int(min(free, limit - used + int(stat.get("inactive_file", 0))))


def _devices(config: WorkerConfig) -> tuple[str, ...]:
    if config.num_ranks == 1:
        return (config.device,)
    num_devices = torch.cuda.device_count() if config.device.startswith("cuda") else 0
    return rank_devices(Mesh(tp=config.tp, cp=config.cp), config.device, num_devices)


class _Need(NamedTuple):
    """Bytes of one rank."""

    weights: int
    kv: int
    offloaded: int
    process: int

    def __str__(self) -> str:
        named = {
            "weights": self.weights,
            "KV": self.kv,
            "offloaded KV": self.offloaded,
            "process": self.process,
        }
        return " + ".join(f"{what} {_text(num_bytes)}" for what, num_bytes in named.items() if num_bytes)


def _text(num_bytes: int) -> str:
    return f"{-(-num_bytes // 2**20):,} MiB"
