"""How processes know that they serve the same model."""

from __future__ import annotations

import logging

import msgspec

from anabranch.model.config import ModelConfig
from anabranch.model.digest import weights_digest
from anabranch.model.load import check_weights
from anabranch.model.sources import ModelSource
from anabranch.protocol.workers import ModelIdentity

logger = logging.getLogger(__name__)


def identity_of(name: str, config: ModelConfig) -> ModelIdentity:
    """The identity of a loaded model.

    Args:
        config: with the weights' digest; without, the fingerprint stays empty.
    """
    return ModelIdentity(
        model=name,
        model_fingerprint=config.fingerprint() if config.weights_digest else "",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )


def read_identity(source: ModelSource, config: ModelConfig) -> ModelIdentity:
    """The identity of a model that is not loaded, after its weights' headers and a sample of values were checked.

    Where there are no weights at all, which an orchestrator can do without, it has no fingerprint.

    Raises:
        CheckpointError: there are weights, but broken or of another shape.
    """
    if not source.has_weights():
        logger.info("no weights are in %s: the workers' are compared with each other's alone", source.path)
        return identity_of(source.name, config)
    with source.weights() as weights:
        check_weights(config, weights)
        config = msgspec.structs.replace(config, weights_digest=weights_digest(weights))
    return identity_of(source.name, config)
