"""Tiny models whose greedy answers in transformers are known."""

from __future__ import annotations

import random
from pathlib import Path

from anabranch.model.sources import resolve_model
from launch.reference import Reference
from tests.support.families import VOCAB, save

# Closer than this, the best two tokens might change places on another machine.
MIN_MARGIN = 2e-3
MAX_DRAWS = 40

Prompt = tuple[int, ...]


class Known:
    """A model folder, and prompts whose greedy answers in transformers are clear.

    Args:
        folder: an empty one, for the model.
        context: most tokens of one request.
        overrides: of the recipe's configuration.
    """

    def __init__(self, recipe: str, folder: Path, context: int, **overrides: object) -> None:
        self.folder = save(recipe, folder, max_position_embeddings=context, **overrides)
        self.reference = Reference(resolve_model(str(self.folder)))
        self._rng = random.Random(recipe)

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one KV block in float32."""
        config = self.reference.model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(8 * config.num_hidden_layers * config.num_key_value_heads * head_dim * block_size)

    def clear(self, length: int, num_tokens: int, begin: Prompt = ()) -> tuple[Prompt, Prompt]:
        """A prompt of `length` tokens, the first of them `begin`, and its answer past any end of sequence."""
        for _ in range(MAX_DRAWS):
            prompt = begin + tuple(self._rng.randrange(VOCAB) for _ in range(length - len(begin)))
            answer = self.reference.generate(prompt, num_tokens, ignore_eos=True)
            if min(answer.margins) > MIN_MARGIN:
                return prompt, answer.token_ids
        raise AssertionError(f"no prompt of {length} tokens has a clear answer of {num_tokens}")
