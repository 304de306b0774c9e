"""From a model's name to weights in memory: the one call that a worker makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import msgspec
import torch

from anabranch.kernels.base import Kernels, Products
from anabranch.kernels.plain import PlainKernels
from anabranch.model.attention_stack import AttentionStack
from anabranch.model.config import ModelConfig
from anabranch.model.digest import weights_digest
from anabranch.model.expert_table import ExpertTable
from anabranch.model.ffn_stack import FfnStack
from anabranch.model.loader import Progress, WeightLoader
from anabranch.model.size import shared_features, smallest_ffn, smallest_held
from anabranch.model.sources import ModelSource, resolve_model
from anabranch.model.transformer import Transformer
from anabranch.model.weights import WeightSource
from anabranch.parallel.group import Group, SingleRank
from anabranch.parallel.split import check_tp


def load_model(
    model: str | ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    group: Group,
    config: ModelConfig | None = None,
    progress: Progress | None = None,
) -> tuple[ModelConfig, Transformer]:
    """Resolve, check and load this rank's part of a model.

    Args:
        model: a known name, a path, or what `resolve_model` made of it.
        config: the model's, where it is known already; reading it again would cost transformers' import.
        progress: told of the parts loaded, see `anabranch.model.progress`.

    Returns:
        The configuration, with the weights' digest, and the model.

    Raises:
        ModelError: unknown, not supported, or broken.
        ConfigError: the group does not fit the model.
    """
    with _opened(_source_of(model), config) as (config, weights):
        transformer = load_transformer(
            config, weights, dtype=dtype, device=device, kernels=kernels, group=group, progress=progress
        )
    return config, transformer


def load_attention_stack(
    model: str | ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    group: Group,
    shared_expert: Literal["attn", "ffn"] = "attn",
    config: ModelConfig | None = None,
    progress: Progress | None = None,
) -> tuple[ModelConfig, AttentionStack]:
    """`load_model` for a process whose FFN halves are elsewhere; for `shared_expert` see `AttentionStack`.

    The whole checkpoint's headers are checked all the same, and the digest is that of all processes of the model.
    """
    with _opened(_source_of(model), config) as (config, weights):
        own = shared_features(config) if shared_expert == "attn" else 0
        check_tp(group.size, config.num_heads, own or group.size)
        loader = WeightLoader(config, weights, dtype, device, num_parts=config.num_layers + 2, progress=progress)
        attention = AttentionStack(loader, kernels, group, shared_expert=shared_expert)
        loader.finish("attention")
    return config, attention


def load_expert_table(
    model: str | ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    products: Products,
    group: Group,
    shared: bool = False,
    config: ModelConfig | None = None,
) -> tuple[ModelConfig, ExpertTable]:
    """`load_model` for a process that is to hold FFN halves alone: an empty table, for which all has been checked.

    Args:
        shared: see `ExpertTable`.
    """
    source = _source_of(model)
    with _opened(source, config) as (config, _):
        check_tp(group.size, group.size, smallest_held(config, shared=shared))
    table = ExpertTable(source, config, dtype=dtype, device=device, products=products, group=group, shared=shared)
    return config, table


def _source_of(model: str | ModelSource) -> ModelSource:
    return resolve_model(model) if isinstance(model, str) else model


@contextmanager
def _opened(source: ModelSource, config: ModelConfig | None) -> Iterator[tuple[ModelConfig, WeightSource]]:
    """The configuration, with the weights' digest, and the weights, which have been checked."""
    config, weights = source.open() if config is None else (config, source.weights())
    with weights:
        check_weights(config, weights)
        yield msgspec.structs.replace(config, weights_digest=weights_digest(weights)), weights


def check_weights(config: ModelConfig, weights: WeightSource) -> None:
    """Compare names, shapes and dtypes of all tensors with the configuration, by the files' headers alone.

    It is the model's own constructors that ask for every tensor, so that what is checked is what will be loaded.

    Raises:
        CheckpointError: a tensor is missing, too many, or of another shape or dtype.
    """
    meta = torch.device("meta")
    load_transformer(config, weights, dtype=torch.float32, device=meta, kernels=PlainKernels(), group=SingleRank())


def load_transformer(
    config: ModelConfig,
    source: WeightSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    group: Group,
    progress: Progress | None = None,
) -> Transformer:
    """This rank's part of both stacks.

    Args:
        source: checkpoint; only this rank's slices are read.
        dtype: of weights and activations.
        kernels: what the layers compute with.
        group: ranks that the layers are sharded over.

    Raises:
        ConfigError: the group is larger than the model can be cut.
        CheckpointError: the checkpoint is broken or contradicts the configuration.
    """
    check_tp(group.size, config.num_heads, smallest_ffn(config))
    loader = WeightLoader(config, source, dtype, device, num_parts=2 * config.num_layers + 2, progress=progress)
    transformer = Transformer(AttentionStack(loader, kernels, group), FfnStack(loader, kernels, group))
    loader.finish("attention", "ffn")
    return transformer
