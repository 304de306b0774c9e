"""From a model's name to weights in memory: the one call that a worker makes."""

from __future__ import annotations

import hashlib

import msgspec
import torch

from anabranch.kernels.base import Kernels
from anabranch.kernels.plain import PlainKernels
from anabranch.model.attention_stack import AttentionStack
from anabranch.model.config import ModelConfig
from anabranch.model.ffn_stack import FfnStack
from anabranch.model.loader import Progress, WeightLoader, check_finite
from anabranch.model.sources import ModelSource, resolve_model
from anabranch.model.transformer import Transformer, smallest_ffn
from anabranch.model.weights import WeightSource
from anabranch.parallel.group import Group, SingleRank
from anabranch.parallel.split import check_tp

DIGEST_SAMPLE = 64


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
    source = resolve_model(model) if isinstance(model, str) else model
    config, weights = source.open() if config is None else (config, source.weights())
    with weights:
        check_weights(config, weights)
        config = msgspec.structs.replace(config, weights_digest=weights_digest(weights))
        transformer = load_transformer(
            config, weights, dtype=dtype, device=device, kernels=kernels, group=group, progress=progress
        )
    return config, transformer


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


def weights_digest(source: WeightSource) -> str:
    """Hash of all names and shapes and of a few values of each tensor outside the experts.

    Raises:
        CheckpointError: a tensor cannot be read, or the values looked at (its first row) are not finite.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(source.names()):
        shape = source.shape(name)
        digest.update(f"{name}{shape}".encode())
        # A mixture of experts has tens of thousands of tensors; names and shapes are enough of those.
        if ".experts." in name or not shape:
            continue
        sample = source.read(name, (slice(0, 1),)) if len(shape) > 1 else source.read(name)
        check_finite(sample, name, source)
        digest.update(sample.flatten()[:DIGEST_SAMPLE].float().numpy().tobytes())
    return digest.hexdigest()
