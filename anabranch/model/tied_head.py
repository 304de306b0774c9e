"""What becomes of a stored LM head where the configuration ties it to the embedding."""

from __future__ import annotations

import logging

import msgspec
import torch

from anabranch.model.config import ModelConfig
from anabranch.model.weights import WeightSource

logger = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
CHUNK_BYTES = 32 * 1024 * 1024


def with_stored_head(config: ModelConfig, weights: WeightSource) -> ModelConfig:
    """Untie the head where the checkpoint stores one that differs from the embedding, as transformers does.

    Both are read in full, if both are there: the price of a checkpoint that contradicts its configuration, or stores
    the same values twice.

    Raises:
        CheckpointError: one of both cannot be read.
    """
    names = weights.names()
    if not config.tie_embeddings or EMBEDDING not in names or LM_HEAD not in names or _equal(weights):
        return config
    logger.warning(
        "%s: %s differs from the embedding and is used, although tie_word_embeddings is true",
        weights.where(LM_HEAD),
        LM_HEAD,
    )
    return msgspec.structs.replace(config, tie_embeddings=False)


def _equal(weights: WeightSource) -> bool:
    shape = weights.shape(EMBEDDING)
    if len(shape) != 2 or weights.shape(LM_HEAD) != shape:
        return False
    num_rows, num_columns = shape
    step = max(1, CHUNK_BYTES // max(1, 4 * num_columns))
    for start in range(0, num_rows, step):
        rows = (slice(start, start + step),)
        # Copied, since the next read may end the view.
        embedding_VC = weights.read(EMBEDDING, rows).to(torch.float32, copy=True)
        if not torch.equal(embedding_VC, weights.read(LM_HEAD, rows).float()):
            return False
    return True
