"""From a Hugging Face configuration to a ModelConfig: which families and options are supported, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anabranch.errors import CheckpointError, UnsupportedArchitecture
from anabranch.model.config import ModelConfig, MoeConfig
from anabranch.model.context_length import context_length
from anabranch.model.rope import rope_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUPPORTED_ACTIVATIONS = ("silu", "swish")


@dataclass(frozen=True, kw_only=True)
class _Traits:
    """What the families differ in."""

    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused_projections: bool = False
    partial_rotary: bool = False
    moe: MoeConfig | None = None


def _one_window(hf: PretrainedConfig) -> tuple[int | None, ...]:
    window: int | None = hf.sliding_window
    return (window,) * int(hf.num_hidden_layers)


def _window_by_layer(hf: PretrainedConfig) -> tuple[int | None, ...]:
    kinds = {"full_attention": None, "sliding_attention": hf.sliding_window or None}
    unknown = sorted(set(hf.layer_types) - set(kinds))
    if unknown:
        raise UnsupportedArchitecture(f"layer_types: {unknown[0]!r} is not supported; {' and '.join(kinds)} are")
    return tuple(kinds[kind] for kind in hf.layer_types)


def _qwen_moe(hf: PretrainedConfig, shared_intermediate: int) -> MoeConfig:
    return MoeConfig(
        num_experts=hf.num_experts,
        top_k=hf.num_experts_per_tok,
        expert_intermediate=hf.moe_intermediate_size,
        shared_expert_intermediate=shared_intermediate,
        norm_topk_prob=hf.norm_topk_prob,
        sparse_layers=tuple(
            layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0
            for layer in range(hf.num_hidden_layers)
        ),
    )


def _llama(hf: PretrainedConfig) -> _Traits:
    bias = hf.attention_bias
    return _Traits(windows=(None,) * hf.num_hidden_layers, qkv_bias=bias, o_bias=bias, mlp_bias=hf.mlp_bias)


def _mistral(hf: PretrainedConfig) -> _Traits:
    return _Traits(windows=_one_window(hf))


def _phi3(hf: PretrainedConfig) -> _Traits:
    return _Traits(windows=_one_window(hf), fused_projections=True, partial_rotary=True)


def _qwen2(hf: PretrainedConfig) -> _Traits:
    return _Traits(windows=_window_by_layer(hf), qkv_bias=True)


def _qwen3(hf: PretrainedConfig) -> _Traits:
    bias = hf.attention_bias
    return _Traits(windows=_window_by_layer(hf), qkv_bias=bias, o_bias=bias, qk_norm=True)


def _mixtral(hf: PretrainedConfig) -> _Traits:
    moe = MoeConfig(
        num_experts=hf.num_local_experts,
        top_k=hf.num_experts_per_tok,
        expert_intermediate=hf.intermediate_size,
        shared_expert_intermediate=0,
        norm_topk_prob=True,
        sparse_layers=(True,) * hf.num_hidden_layers,
    )
    return _Traits(windows=_one_window(hf), moe=moe)


def _qwen2_moe(hf: PretrainedConfig) -> _Traits:
    moe = _qwen_moe(hf, hf.shared_expert_intermediate_size)
    return _Traits(windows=_window_by_layer(hf), qkv_bias=hf.qkv_bias, moe=moe)


def _qwen3_moe(hf: PretrainedConfig) -> _Traits:
    bias = hf.attention_bias
    return _Traits(windows=_one_window(hf), qkv_bias=bias, o_bias=bias, qk_norm=True, moe=_qwen_moe(hf, 0))


_FAMILIES: dict[str, tuple[str, Callable[[PretrainedConfig], _Traits]]] = {
    "LlamaForCausalLM": ("llama", _llama),
    "MistralForCausalLM": ("mistral", _mistral),
    "Phi3ForCausalLM": ("phi3", _phi3),
    "Qwen2ForCausalLM": ("qwen2", _qwen2),
    "Qwen3ForCausalLM": ("qwen3", _qwen3),
    "MixtralForCausalLM": ("mixtral", _mixtral),
    "Qwen2MoeForCausalLM": ("qwen2_moe", _qwen2_moe),
    "Qwen3MoeForCausalLM": ("qwen3_moe", _qwen3_moe),
}

SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)


def supported_architecture(architectures: list[str] | None, model_type: str | None) -> str:
    """The architecture that a configuration names, by class name or else by model type.

    Raises:
        UnsupportedArchitecture: names what was found and what is supported.
    """
    if architectures:
        for architecture in architectures:
            if architecture in _FAMILIES and _FAMILIES[architecture][0] == model_type:
                return architecture
        found = ", ".join(str(name) for name in architectures)
    else:
        for architecture, (family, _) in _FAMILIES.items():
            if family == model_type:
                return architecture
        found = f"model type {model_type!r}"
    raise UnsupportedArchitecture(
        f"{found} (model type {model_type!r}) is not supported; supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def model_config(hf: PretrainedConfig, generation: dict[str, object] | None = None) -> ModelConfig:
    """Translate a transformers configuration.

    Args:
        generation: the content of generation_config.json; its end-of-sequence ids go before the model's.

    Raises:
        UnsupportedArchitecture: a family or option that is not supported, by name.
        CheckpointError: values that contradict each other.
    """
    architecture = supported_architecture(hf.architectures, hf.model_type)
    if hf.hidden_act not in SUPPORTED_ACTIVATIONS:
        raise UnsupportedArchitecture(f"hidden_act: {hf.hidden_act!r} is not supported; silu is")
    if getattr(hf, "quantization_config", None) is not None:
        raise UnsupportedArchitecture("quantization_config: quantised safetensors are not supported; GGUF files are")
    traits = _FAMILIES[architecture][1](hf)
    max_context = context_length(hf)
    generation = generation or {}
    return ModelConfig(
        architecture=architecture,
        model_type=hf.model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        intermediate_size=hf.intermediate_size,
        rms_eps=hf.rms_norm_eps,
        rope=rope_config(hf, partial=traits.partial_rotary),
        max_context=max_context,
        tie_embeddings=bool(hf.tie_word_embeddings),
        qkv_bias=traits.qkv_bias,
        o_bias=traits.o_bias,
        mlp_bias=traits.mlp_bias,
        qk_norm=traits.qk_norm,
        windows=traits.windows,
        fused_projections=traits.fused_projections,
        moe=traits.moe,
        eos_token_ids=_token_ids(_first_given(generation.get("eos_token_id"), hf.eos_token_id)),
        bos_token_id=next(iter(_token_ids(_first_given(generation.get("bos_token_id"), hf.bos_token_id))), None),
    )


def _first_given(*values: object) -> object:
    return next((value for value in values if value is not None), None)


def _token_ids(value: object) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise CheckpointError(f"model configuration: token ids {value!r} are not integers")
    return tuple(ids)
