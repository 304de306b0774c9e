"""Models whose greedy answers in transformers are known: tiny random ones, and SmolLM2."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from anabranch.model.sources import resolve_model
from launch.reference import Reference
from tests.support.families import VOCAB, save
from tests.support.references import Fingerprint, KnownAnswers, Prompt, draw_prompt, fingerprint_of

__all__ = ["SMOLLM2", "Known", "Prompt", "smollm2_answers"]

SMOLLM2 = "smollm2-135m"


class Known(KnownAnswers):
    """A model folder, and prompts whose greedy answers in transformers are clear.

    Args:
        folder: an empty one, for the model.
        context: most tokens of one request.
        overrides: of the recipe's configuration.
    """

    def __init__(self, recipe: str, folder: Path, context: int, **overrides: object) -> None:
        self.folder = save(recipe, folder, max_position_embeddings=context, **overrides)
        source = resolve_model(str(self.folder))
        self._config = source.config()
        super().__init__(
            f"{recipe}-{context}",
            fingerprint_of(self.folder, VOCAB),
            VOCAB,
            partial(Reference, source),
            {"recipe": recipe, "context": context, "overrides": overrides},
        )

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one KV block in float32."""
        config = self._config
        return 8 * config.num_layers * config.num_kv_heads * config.head_dim * block_size


def smollm2_answers() -> KnownAnswers:
    """Of SmolLM2 in float32, as this version of its package is converted by this version of the conversion."""
    source = resolve_model(SMOLLM2)
    vocab_size = source.config().vocab_size
    return KnownAnswers(
        SMOLLM2,
        Fingerprint(config=source.path.name, prompt=draw_prompt(vocab_size, 8)),
        vocab_size,
        partial(Reference, source),
        {"known": SMOLLM2},
    )
