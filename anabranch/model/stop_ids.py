"""Which tokens end an answer: one list, made once by whoever holds the tokenizer.

The orchestrator makes it, reports it, hides the text of what is on it, and puts it into every request. Workers know
no other: with lists of their own, made from files of their own, they could end where it does not or go on where it
does.
"""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.errors import CheckpointError
from anabranch.model.config import ModelConfig
from anabranch.request.sampling_params import MAX_MODEL_STOP_IDS


def stop_ids(config: ModelConfig, of_tokenizer: Sequence[int]) -> tuple[int, ...]:
    """The model's end-of-sequence tokens, then its tokenizer's, then those that end a turn.

    Args:
        config: generation_config.json's ids, or else config.json's; of a GGUF file, its metadata's.
        of_tokenizer: `Tokenizer.eos_token_ids`; empty where a folder has no tokenizer.

    Raises:
        CheckpointError: there are more than a request can carry.
    """
    ids = dict.fromkeys((*config.eos_token_ids, *of_tokenizer))
    known = tuple(token for token in ids if 0 <= token < config.vocab_size)
    if len(known) > MAX_MODEL_STOP_IDS:
        raise CheckpointError(f"{len(known)} tokens end an answer of this model; at most {MAX_MODEL_STOP_IDS} may")
    return known
