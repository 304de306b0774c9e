"""How many tokens a model's positions reach: its trained length, and what a rotary scaling makes of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from anabranch.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

ORIGINAL = "original_max_position_embeddings"

# llama3 scales frequencies too, but its max_position_embeddings is the scaled length already.
_SCALED = ("linear", "dynamic", "yarn", "llama3")
_STRETCHING = ("linear", "yarn")


def context_length(hf: PretrainedConfig) -> int:
    """Most tokens of prompt and answer, as vLLM counts them but for two scalings.

    Linear and yarn scaling stretch the original length by their factor. Dynamic scaling would too, but past the
    trained length its frequencies follow the length of each call, so that what a token's key is would depend on how
    the prompt was cut into steps; it is served up to the trained length, where it changes nothing.

    Longrope has two sets of factors, and transformers goes by the length of the sequence so far: with the short ones
    up to the original length; past it with the long ones, for which it computes all keys anew. Cached and shared keys
    cannot follow that, so it is served up to the original length with the short factors, where every request is
    exact. vLLM and llama.cpp serve longer contexts with the long factors for all requests, and so give others than
    transformers' tokens to those that stay short.

    Raises:
        CheckpointError: a factor or an original length that no context can be computed from, by name.
    """
    trained = int(hf.max_position_embeddings)
    parameters = hf.rope_parameters
    kind = parameters["rope_type"]
    if kind == "longrope":
        return _longrope_context(trained, check_original(parameters))
    if kind not in _SCALED:
        return trained
    factor = parameters.get("factor")
    original = check_original(parameters)
    if factor is None and kind == "yarn":
        # What transformers does: the ratio of both lengths is the factor.
        return trained
    factor = _check("factor", factor, least=1.0)
    stretched = math.floor((trained if original is None else original) * factor)
    if kind == "dynamic" and stretched > trained:
        logger.warning(
            "rope_type dynamic: %d tokens of context are served, the trained length, not the %d that factor %g would "
            "reach",
            trained,
            stretched,
            factor,
        )
    if kind not in _STRETCHING:
        return trained
    if stretched < trained:
        logger.warning(
            "rope_type %s: %d tokens of context are served, the original length times factor %g, not the %d of "
            "max_position_embeddings",
            kind,
            stretched,
            factor,
            trained,
        )
    return stretched


def _longrope_context(trained: int, original: float | None) -> int:
    served = trained if original is None else min(trained, math.floor(original))
    if served < trained:
        logger.warning(
            "rope_type longrope: %d tokens of context are served, the original length that the short factors are for, "
            "not the %d of max_position_embeddings",
            served,
            trained,
        )
    return served


def check_original(parameters: Mapping[str, object]) -> float | None:
    """The length before scaling, where rotary parameters say it. Raises CheckpointError where it is none."""
    original = parameters.get(ORIGINAL)
    return None if original is None else _check(ORIGINAL, original, least=1)


def _check(key: str, value: object, *, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise CheckpointError(
            f"model configuration: rope_parameters: {key} is {value!r}; it must be a number of at least {least:g}"
        )
    return value
