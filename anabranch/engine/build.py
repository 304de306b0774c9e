"""From a worker's configuration to an engine: resolve, load, allocate."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from anabranch.cache.kv_manager import KvCacheManager
from anabranch.cache.paged_kv import PagedKv
from anabranch.config.worker import WorkerConfig
from anabranch.engine.device import resolve_device, resolve_dtype
from anabranch.engine.runner import Runner
from anabranch.errors import ConfigError
from anabranch.kernels.native import select_kernels
from anabranch.model.config import ModelConfig
from anabranch.model.load import load_model
from anabranch.model.progress import progress_bar
from anabranch.parallel.group import SingleRank
from anabranch.parallel.layout import KvLayout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What a scheduler works with.

    Attributes:
        max_context: most tokens of one request: the least of model, pool and configuration.
    """

    model_config: ModelConfig
    layout: KvLayout
    runner: Runner
    kv: PagedKv
    cache: KvCacheManager
    max_context: int


def build_engine(config: WorkerConfig) -> Engine:
    """Load the model and allocate the KV pool.

    Raises:
        ConfigError: the pool is too small for a single block, or the device cannot be had.
        ModelError: the model cannot be found, is not supported, or its files are broken.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    kernels = select_kernels(device, dtype, config.native_kernels)
    with progress_bar(f"loading {config.model}") as progress:
        model_config, model = load_model(config.model, dtype=dtype, device=device, kernels=kernels, group=SingleRank())
    layout = KvLayout(
        dtype=str(dtype).removeprefix("torch."),
        num_layers=model_config.num_layers,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=config.block_size,
        tp=config.tp,
        cp=config.cp,
    )
    block_bytes = layout.token_bytes * config.block_size
    num_blocks = config.kv_cache_bytes // block_bytes
    if num_blocks < 1:
        raise ConfigError("kv_cache_bytes", config.kv_cache_bytes, f"must hold one block of {block_bytes} bytes")
    kv = PagedKv(
        num_layers=layout.num_layers,
        num_blocks=num_blocks,
        block_size=config.block_size,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=dtype,
        device=device,
    )
    limits = [model_config.max_context, num_blocks * config.block_size]
    if config.max_context:
        limits.append(config.max_context)
    logger.info(
        "%s in %s on %s, %s kernels, %d threads; %d KV blocks of %d tokens",
        config.model,
        layout.dtype,
        device,
        kernels.name,
        torch.get_num_threads(),
        num_blocks,
        config.block_size,
    )
    return Engine(
        model_config=model_config,
        layout=layout,
        runner=Runner(model, kv, kernels, device),
        kv=kv,
        cache=KvCacheManager(num_blocks=num_blocks, block_size=config.block_size, prefix_cache=config.prefix_cache),
        max_context=min(limits),
    )
