"""Rotary frequencies of a Hugging Face configuration, by transformers' own scaling functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anabranch.errors import CheckpointError, UnsupportedArchitecture
from anabranch.model.config import RopeConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# "dynamic" changes frequencies only past the trained length, which is the longest that is served: `context_length`.
SUPPORTED_ROPE = ("default", "linear", "dynamic", "llama3", "yarn")


def rope_config(hf: PretrainedConfig) -> RopeConfig:
    """The frequencies that transformers would rotate with.

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
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedArchitecture("partial_rotary_factor: only 1.0 is supported")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    if head_dim < 2 or head_dim % 2:
        raise CheckpointError(f"model configuration: head_dim {head_dim} is odd; rotary embedding needs pairs")
    if kind in ("default", "dynamic"):
        exponents_D = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        inv_freq, scaling = 1.0 / (parameters["rope_theta"] ** exponents_D), 1.0
    else:
        try:
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](hf)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise CheckpointError(f"model configuration: rope_parameters {parameters}: {error!r}") from error
    return RopeConfig(kind=kind, inv_freq=tuple(inv_freq.tolist()), attention_scaling=float(scaling))
