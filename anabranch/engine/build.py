"""From a worker's configuration to an engine: resolve, load, allocate."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import torch

from anabranch.attention.pass_rule import HeadShape, PassRule, RingRates
from anabranch.attention.tree_reduce import Reduction, TreeReduction
from anabranch.cache.host_kv import HostKv
from anabranch.cache.kv_manager import KvCacheManager
from anabranch.cache.paged_kv import PagedKv
from anabranch.config.worker import WorkerConfig
from anabranch.engine.device import resolve_device, resolve_dtype
from anabranch.engine.fit import kv_layout, num_host_blocks, num_kv_blocks
from anabranch.engine.runner import Runner
from anabranch.engine.seam_programs import SeamPrograms
from anabranch.engine.step_programs import StepPrograms
from anabranch.kernels.base import Kernels
from anabranch.kernels.native import select_kernels
from anabranch.kernels.record import StepRecorder
from anabranch.model.attention_stack import AttentionStack
from anabranch.model.config import ModelConfig
from anabranch.model.load import load_attention_stack, load_model
from anabranch.model.progress import progress_bar
from anabranch.model.transformer import Transformer
from anabranch.parallel.context import RankContext
from anabranch.parallel.layout import KvLayout
from anabranch.parallel.split import query_heads_of

logger = logging.getLogger(__name__)

# Constants, not measured: the order of magnitude of a CPU core and of shared memory.
CPU_RING_RATES = RingRates(attention_flops_per_s=1e11, link_bytes_per_s=4e9, message_s=5e-5, taken_share=1.0)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One rank's engine, and on the driving rank what its scheduler works with.

    Attributes:
        layout: how the worker spreads KV over its ranks.
        cache: block management of all ranks: a block here is one block of every CP rank.
        max_context: most tokens of one request: the least of model, pool and configuration.
        host: blocks in host memory; None where requests that are preempted are always recomputed.
    """

    model_config: ModelConfig
    layout: KvLayout
    context: RankContext
    runner: Runner
    kv: PagedKv
    cache: KvCacheManager
    max_context: int
    host: HostKv | None = None


def build_engine(
    config: WorkerConfig, context: RankContext | None = None, model_config: ModelConfig | None = None
) -> Engine:
    """Load this rank's part of the model and allocate its KV pool.

    Args:
        context: the rank's place in the worker's mesh; None: the only one.
        model_config: the model's, where it has been read already.

    Raises:
        ConfigError: the pool is too small for a single block, the mesh does not fit, or no such device.
        ModelError: the model cannot be found, is not supported, or its files are broken.
    """
    context = context or RankContext()
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    kernels = select_kernels(device, dtype, config.native_kernels)
    # An attention worker's FFN halves are elsewhere.
    load = partial(load_attention_stack, shared_expert=config.shared_expert) if config.role == "attn" else load_model
    with progress_bar(f"loading {config.model}") as progress:
        model_config, model = load(
            config.model,
            dtype=dtype,
            device=device,
            kernels=kernels,
            group=context.tp,
            config=model_config,
            progress=progress,
        )
    layout = kv_layout(config, model_config)
    kv = _allocate(config, layout, context, dtype, device)
    num_host = num_host_blocks(config, layout)
    limits = [model_config.max_context, kv.num_blocks * config.block_size * config.cp]
    if config.max_context:
        limits.append(config.max_context)
    logger.info(
        "%s in %s on %s, %s kernels, %d threads; %d KV blocks of %d tokens, %.0f MiB; %d more in host memory",
        config.model,
        layout.dtype,
        device,
        kernels.name,
        torch.get_num_threads(),
        kv.num_blocks,
        config.block_size,
        kv.num_bytes / 2**20,
        num_host,
    )
    runner = Runner(
        model,
        kv,
        kernels,
        device,
        context,
        _pass_rule(config, model_config, context, layout),
        _reduction(context),
        _programs(config, model, kv, kernels, min(limits)),
    )
    return Engine(
        model_config=model_config,
        layout=layout,
        context=context,
        runner=runner,
        kv=kv,
        cache=KvCacheManager(
            num_blocks=kv.num_blocks, block_size=config.block_size * config.cp, prefix_cache=config.prefix_cache
        ),
        max_context=min(limits),
        host=HostKv(kv, num_host) if num_host else None,
    )


def _allocate(
    config: WorkerConfig, layout: KvLayout, context: RankContext, dtype: torch.dtype, device: torch.device
) -> PagedKv:
    """This rank's pool."""
    return PagedKv(
        num_layers=layout.num_layers,
        num_blocks=num_kv_blocks(config, layout),
        block_size=config.block_size,
        num_kv_heads=len(layout.heads_of(context.tp_rank)),
        head_dim=layout.head_dim,
        dtype=dtype,
        device=device,
    )


def _pass_rule(config: WorkerConfig, model: ModelConfig, context: RankContext, layout: KvLayout) -> PassRule | None:
    if context.cp is None:
        return None
    # The first TP rank's heads for all: every rank has to choose alike.
    shape = HeadShape(
        num_heads=len(query_heads_of(model.num_heads, model.num_kv_heads, config.tp, 0)),
        num_kv_heads=len(layout.heads_of(0)),
        head_dim=model.head_dim,
        element_bytes=layout.element_bytes,
    )
    return PassRule(config.ring, shape, config.cp, CPU_RING_RATES)


def _reduction(context: RankContext) -> Reduction | None:
    return None if context.cp is None else TreeReduction(context.cp)


def _programs(
    config: WorkerConfig, model: Transformer | AttentionStack, kv: PagedKv, kernels: Kernels, max_context: int
) -> StepPrograms | SeamPrograms | None:
    """Room for recorded decode steps; None where they are not wanted, or cannot be recorded."""
    if not isinstance(kernels, StepRecorder) or not config.step_programs or config.cp > 1:
        return None
    max_rows, max_blocks = config.max_running, min(kv.num_blocks, -(-max_context // config.block_size))
    if isinstance(model, Transformer):
        return StepPrograms(model, kv, kernels, max_rows=max_rows, max_blocks=max_blocks)
    return SeamPrograms(model, kv, kernels, max_rows=max_rows, max_blocks=max_blocks)
