"""Rotary frequencies of a Hugging Face configuration, by transformers' own scaling functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anabranch.errors import CheckpointError, UnsupportedArchitecture, shown
from anabranch.model.config import RopeConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# "dynamic" and "longrope" change frequencies only past a length, which is the longest that is served: `context_length`.
SUPPORTED_ROPE = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def rope_config(hf: PretrainedConfig, *, partial: bool) -> RopeConfig:
    """The frequencies that transformers would rotate with, up to the longest context that is served.

    Args:
        partial: whether the family in transformers heeds `partial_rotary_factor`; others would turn whole heads.

    Raises:
        UnsupportedArchitecture: a scaling that is not supported, by name.
        CheckpointError: parameters that the scaling cannot be computed from.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = hf.rope_parameters
    kind = parameters["rope_type"]
    if kind not in SUPPORTED_ROPE:
        raise UnsupportedArchitecture(f"rope_type: {kind!r} is not supported; {', '.join(SUPPORTED_ROPE)} are")
    share = parameters.get("partial_rotary_factor", 1.0)
    if share != 1.0 and not partial:
        raise UnsupportedArchitecture(f"partial_rotary_factor: only 1.0 is supported with model type {hf.model_type!r}")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(
            f"model configuration: head_dim {head_dim} times partial_rotary_factor {share:g} is {rotary_dim} features; "
            "rotary embedding needs pairs"
        )
    if kind == "longrope":
        for key in ("short_factor", "long_factor"):
            _check_factors(key, parameters.get(key), rotary_dim // 2)
    if kind in ("default", "dynamic"):
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim
        inv_freq, scaling = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    else:
        try:
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](hf)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"model configuration: rope_parameters {parameters}: {error!r}") from error
    return RopeConfig(kind=kind, inv_freq=tuple(inv_freq.tolist()), attention_scaling=float(scaling))


def _check_factors(key: str, factors: list[float] | None, count: int) -> None:
    if factors is None or len(factors) != count:
        raise CheckpointError(
            f"model configuration: rope_parameters: {key} is {shown(factors)}; it must be a list of {count} numbers, "
            "one for each pair of rotary features"
        )
