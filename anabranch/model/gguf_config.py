"""A GGUF file's metadata as a model configuration."""

from __future__ import annotations

import math

import msgspec

from anabranch.errors import CheckpointError, ModelError, UnsupportedArchitecture
from anabranch.model.config import ModelConfig
from anabranch.model.config_bounds import checked_fields, real_number, whole_number
from anabranch.model.families import model_config
from anabranch.model.gguf_weights import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, GgufFile

# GGUF architecture -> the family's prefix in transformers. A llama with experts is a Mixtral.
GGUF_ARCHITECTURES = {
    "llama": "Llama",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen2moe": "Qwen2Moe",
    "qwen3": "Qwen3",
    "qwen3moe": "Qwen3Moe",
}


def read_gguf_config(file: GgufFile) -> ModelConfig:
    """Configuration of a GGUF file: its metadata, and what the presence of tensors says.

    Raises:
        CheckpointError: metadata is missing or contradicts itself.
        UnsupportedArchitecture: names the architecture or option.
    """
    architecture = file.text("general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"{file.path}: GGUF architecture {architecture!r} is not supported; "
            f"supported are {', '.join(GGUF_ARCHITECTURES)}"
        )
    family = GGUF_ARCHITECTURES[architecture]
    if family == "Llama" and file.number("llama.expert_count"):
        family = "Mixtral"
    import transformers

    try:
        fields = checked_fields(str(file.path), _fields(file, architecture, family))
        hf = getattr(transformers, f"{family}Config")(**fields, architectures=[f"{family}ForCausalLM"])
        config = model_config(hf)
    except ModelError:
        raise
    # transformers' validators raise whatever their authors chose; all of it means bad metadata.
    except Exception as error:
        raise CheckpointError(f"{file.path}: {type(error).__name__}: {error}") from error
    return _with_rope_factors(config, file)


def _fields(file: GgufFile, architecture: str, family: str) -> dict[str, object]:
    """The metadata under transformers' names."""

    def need(key: str, field: str) -> int:
        key = f"{architecture}.{key}"
        value = file.number(key)
        if not value:
            raise CheckpointError(f"{file.path}: {key} is missing")
        return whole_number(str(file.path), key, value, field)

    eps = f"{architecture}.attention.layer_norm_rms_epsilon"
    num_heads = need("attention.head_count", "num_attention_heads")
    hidden_size = need("embedding_length", "hidden_size")
    num_layers = need("block_count", "num_hidden_layers")
    head_dim = file.number(f"{architecture}.attention.key_length") or hidden_size // num_heads
    fields: dict[str, object] = {
        "vocab_size": file.shape("model.embed_tokens.weight")[0],
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.number(f"{architecture}.attention.head_count_kv") or num_heads,
        "head_dim": head_dim,
        "intermediate_size": need("feed_forward_length", "intermediate_size"),
        "max_position_embeddings": need("context_length", "max_position_embeddings"),
        "rms_norm_eps": real_number(str(file.path), eps, file.number(eps), "rms_norm_eps"),
        "rope_parameters": _rope(file, architecture, head_dim),
        "tie_word_embeddings": "lm_head.weight" not in file.names(),
        "bos_token_id": file.number("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": _eos(file),
    }
    has_qkv_bias = "model.layers.0.self_attn.q_proj.bias" in file.names()
    if family in ("Llama", "Qwen3", "Qwen3Moe"):
        fields["attention_bias"] = has_qkv_bias
    if family == "Llama":
        fields["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in file.names()
    if family == "Phi3":
        # Which transformers has beside rope_parameters, and takes for 4096 where it is not given.
        original = file.number(f"{architecture}.rope.scaling.original_context_length")
        fields["original_max_position_embeddings"] = original or fields["max_position_embeddings"]
        fields["sliding_window"] = file.number(f"{architecture}.attention.sliding_window") or None
    if family == "Mixtral":
        fields["num_local_experts"] = need("expert_count", "num_experts")
    if family in ("Qwen2Moe", "Qwen3Moe"):
        fields["num_experts"] = need("expert_count", "num_experts")
        fields["moe_intermediate_size"] = need("expert_feed_forward_length", "moe_intermediate_size")
        # llama.cpp fixes it by architecture; GGUF files do not carry it.
        fields["norm_topk_prob"] = family == "Qwen3Moe"
        fields["mlp_only_layers"] = [n for n in range(num_layers) if _is_dense(file, n)]
    if family == "Qwen2Moe":
        fields["qkv_bias"] = has_qkv_bias
        fields["shared_expert_intermediate_size"] = need(
            "expert_shared_feed_forward_length", "shared_expert_intermediate_size"
        )
    if "Moe" in family or family == "Mixtral":
        fields["num_experts_per_tok"] = need("expert_used_count", "num_experts_per_tok")
    return fields


def _is_dense(file: GgufFile, layer: int) -> bool:
    return f"model.layers.{layer}.mlp.gate_proj.weight" in file.names()


def _eos(file: GgufFile) -> list[int]:
    found = [file.number(f"tokenizer.ggml.{key}_token_id", None) for key in ("eos", "eot", "eom")]
    return sorted({int(token) for token in found if token is not None})


def _rope(file: GgufFile, architecture: str, head_dim: float) -> dict[str, object]:
    rope: dict[str, object] = {"rope_theta": float(file.number(f"{architecture}.rope.freq_base") or 10000.0)}
    rotary_dim = file.number(f"{architecture}.rope.dimension_count") or head_dim
    if rotary_dim != head_dim:
        # Of the product with head_dim, transformers takes the whole part.
        rope["partial_rotary_factor"] = (rotary_dim + 0.5) / head_dim
    # What is not said is as llama.cpp takes it: linear, by 1, of the trained length.
    kind = file.text(f"{architecture}.rope.scaling.type") or "linear"
    factor = file.number(f"{architecture}.rope.scaling.factor") or file.number(f"{architecture}.rope.scale_linear") or 1
    short, long = file.rope_factors(SHORT_FACTORS), file.rope_factors(LONG_FACTORS)
    if (short or long) and (kind == "longrope" or (kind == "linear" and factor == 1)):
        return {**rope, **_longrope(file, architecture, short, long)}
    if short or long:
        raise UnsupportedArchitecture(f"{file.path}: {SHORT_FACTORS} and {LONG_FACTORS} beside scaling by {kind!r}")
    if kind == "none" or (kind == "linear" and factor == 1):
        return {**rope, "rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise UnsupportedArchitecture(f"{file.path}: {architecture}.rope.scaling.type {kind!r} is not supported")
    rope |= {"rope_type": kind, "factor": float(factor)}
    original = file.number(f"{architecture}.rope.scaling.original_context_length")
    if original:
        rope["original_max_position_embeddings"] = int(original)
    if kind == "yarn":
        rope |= _yarn(file, architecture, float(factor))
    return rope


def _longrope(
    file: GgufFile, architecture: str, short: list[float] | None, long: list[float] | None
) -> dict[str, object]:
    """Factors of both kinds and what goes with them, under transformers' names."""
    original = file.number(f"{architecture}.rope.scaling.original_context_length")
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "attention_factor": float(file.number(f"{architecture}.rope.scaling.attn_factor") or 1),
        **({"original_max_position_embeddings": int(original)} if original else {}),
    }


def _yarn(file: GgufFile, architecture: str, factor: float) -> dict[str, object]:
    """What a file says of yarn beside its factor, under transformers' names."""
    yarn: dict[str, object] = {}
    for key in ("beta_fast", "beta_slow"):
        value = file.number(f"{architecture}.rope.scaling.yarn_{key}")
        if value:
            yarn[key] = float(value)
    # A factor on top of yarn's own, which is the whole of transformers' attention_factor.
    more = file.number(f"{architecture}.rope.scaling.yarn_attn_factor") or file.number(
        f"{architecture}.rope.scaling.attn_factor"
    )
    if more and more != 1 and factor > 0:
        yarn["attention_factor"] = float(more) * (0.1 * math.log(factor) + 1.0)
    return yarn


def _with_rope_factors(config: ModelConfig, file: GgufFile) -> ModelConfig:
    """Llama 3's scaling comes as a tensor of divisors of the frequencies."""
    factors = file.rope_factors(ROPE_FACTORS)
    if factors is None:
        return config
    if len(factors) != len(config.rope.inv_freq) or not all(factor > 0 for factor in factors):
        raise CheckpointError(
            f"{file.path}: rope_freqs.weight must hold {len(config.rope.inv_freq)} values above 0, not {len(factors)}"
        )
    import torch

    inv_freq = torch.tensor(config.rope.inv_freq) / torch.tensor(factors)
    rope = msgspec.structs.replace(config.rope, kind="factors", inv_freq=tuple(inv_freq.tolist()))
    return msgspec.structs.replace(config, rope=rope)
