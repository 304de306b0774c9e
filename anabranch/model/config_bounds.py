"""What the values of a model's configuration may be, whoever wrote it: checked before anything is computed from them.

The bounds lie well above the largest models that exist; what they keep out is what would take all memory or time.
"""

from __future__ import annotations

from collections.abc import Mapping

from anabranch.errors import CheckpointError, shown

MAX_LAYERS = 1024
MAX_EXPERTS = 8192
MAX_VOCAB = 1 << 22
MAX_FEATURES = 1 << 20
MAX_TOKENS = (1 << 31) - 1
MAX_TOKEN_IDS = 1024
MAX_TEXT = 1024
MAX_ROPE_VALUES = 4096
MAX_NUMBER = 1e15

# Hugging Face's name -> the least and the largest whole number.
_WHOLE = {
    "vocab_size": (1, MAX_VOCAB),
    "hidden_size": (1, MAX_FEATURES),
    "intermediate_size": (1, MAX_FEATURES),
    "num_hidden_layers": (1, MAX_LAYERS),
    "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096),
    "head_dim": (1, 4096),
    "max_position_embeddings": (1, MAX_TOKENS),
    "original_max_position_embeddings": (1, MAX_TOKENS),
    "sliding_window": (0, MAX_TOKENS),
    "max_window_layers": (0, MAX_FEATURES),
    "num_experts": (1, MAX_EXPERTS),
    "num_local_experts": (1, MAX_EXPERTS),
    "num_experts_per_tok": (1, MAX_EXPERTS),
    "moe_intermediate_size": (1, MAX_FEATURES),
    "shared_expert_intermediate_size": (0, MAX_FEATURES),
    "decoder_sparse_step": (1, MAX_FEATURES),
}
# Name -> the largest number; all are above 0.
_REAL = {"rms_norm_eps": 1.0, "rope_theta": MAX_NUMBER, "partial_rotary_factor": 1.0}
_FLAGS = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "qkv_bias",
    "norm_topk_prob",
    "use_sliding_window",
)
_TEXTS = ("model_type", "hidden_act")
_TOKEN_IDS = ("bos_token_id", "eos_token_id")
_ROPES = ("rope_parameters", "rope_scaling")
_ROPE_FACTORS = ("short_factor", "long_factor")
# Name -> what the list holds, and how much of it at most.
_LISTS: dict[str, tuple[type, int]] = {
    "architectures": (str, 16),
    "layer_types": (str, MAX_LAYERS),
    "mlp_only_layers": (int, MAX_LAYERS),
}


def checked_fields(where: str, raw: Mapping[str, object]) -> dict[str, object]:
    """The fields of a Hugging Face configuration that Anabranch goes by, each within its bounds; the rest is left out.

    Args:
        where: the file, for messages.

    Raises:
        CheckpointError: names the key, the value and what it may be.
    """
    fields: dict[str, object] = {}
    for key, value in raw.items():
        if key in _WHOLE:
            # null stands for a family's own way: no window, as many KV heads as query heads.
            fields[key] = None if value is None else whole_number(where, key, value)
        elif key in _TOKEN_IDS:
            fields[key] = check_token_ids(where, key, value)
        elif key == "quantization_config":
            fields[key] = value
        elif value is None:
            continue
        elif key in _REAL:
            fields[key] = real_number(where, key, value)
        elif key in _ROPES:
            fields[key] = _check_rope(where, key, value)
        elif key in _LISTS:
            fields[key] = _check_list(where, key, value)
        elif key in _FLAGS:
            if not isinstance(value, bool):
                raise _refused(where, key, value, "true or false")
            fields[key] = value
        elif key in _TEXTS:
            if not isinstance(value, str) or len(value) > MAX_TEXT:
                raise _refused(where, key, value, "a short text")
            fields[key] = value
    return fields


def whole_number(where: str, key: str, value: object, field: str = "") -> int:
    """`value` as a whole number within the bounds of Hugging Face's `field`, which this file calls `key`."""
    least, most = _WHOLE[field or key]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _refused(where, key, value, f"a whole number from {least:,} to {most:,}")
    return value


def real_number(where: str, key: str, value: object, field: str = "") -> float:
    """`value` as a number within the bounds of Hugging Face's `field`, which this file calls `key`."""
    most = _REAL[field or key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
        raise _refused(where, key, value, f"a number above 0 and at most {most:g}")
    return value


def check_token_ids(where: str, key: str, value: object) -> object:
    """`value`, which must be one token id, a list of them, or None."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    whole = all(isinstance(token, int) and not isinstance(token, bool) and -1 <= token <= MAX_TOKENS for token in ids)
    if not whole or len(ids) > MAX_TOKEN_IDS:
        raise _refused(where, key, value, f"token ids, at most {MAX_TOKEN_IDS} of them")
    return value


def _check_rope(where: str, key: str, value: object) -> object:
    """Any nesting of named numbers, flags, short texts and lists; most meanings are for the scaling's own functions."""
    if not isinstance(value, dict):
        raise _refused(where, key, value, "an object")
    left: list[tuple[str, str, object]] = [(key, key, value)]
    for count, (path, name, inner) in enumerate(left):
        if count > MAX_ROPE_VALUES:
            raise _refused(where, key, value, f"an object of at most {MAX_ROPE_VALUES} values")
        if name in _ROPE_FACTORS:
            _check_factors(where, path, inner)
        elif isinstance(inner, dict):
            left += [(f"{path}.{part}", str(part), part_value) for part, part_value in inner.items()]
        elif isinstance(inner, list):
            left += [(f"{path}[{part}]", "", part_value) for part, part_value in enumerate(inner)]
        elif isinstance(inner, str):
            if len(inner) > MAX_TEXT:
                raise _refused(where, path, inner, "a short text")
        elif name in _REAL:
            real_number(where, path, inner, name)
        elif isinstance(inner, int | float) and not abs(inner) <= MAX_NUMBER:  # so written, NaN is refused too
            raise _refused(where, path, inner, f"a number from -{MAX_NUMBER:g} to {MAX_NUMBER:g}")
    return value


def _check_factors(where: str, key: str, value: object) -> None:
    if not isinstance(value, list) or len(value) > MAX_ROPE_VALUES or not all(map(_is_factor, value)):
        raise _refused(where, key, value, f"a list of numbers above 0 and at most {MAX_NUMBER:g}")


def _is_factor(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_NUMBER


def _check_list(where: str, key: str, value: object) -> object:
    kind, most = _LISTS[key]
    if not isinstance(value, list) or len(value) > most or not all(type(item) is kind for item in value):
        raise _refused(where, key, value, f"a list of at most {most} values of type {kind.__name__}")
    return value


def _refused(where: str, key: str, value: object, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: {key} is {shown(value)}; it must be {what}")
