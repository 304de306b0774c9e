"""Tiny random models of every family, in odd shapes, shared by all tests."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
import transformers

VOCAB = 101
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Three quarters of 8 features are turned, in 3 pairs. As in Phi-3's own files, the original length lies outside.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.5],
    "long_factor": [1.2, 3.0, 9.0],
}


def heads(query: int, kv: int, dim: int | None = None) -> dict[str, int | None]:
    sizes = {"num_attention_heads": query, "num_key_value_heads": kv}
    return sizes if dim is None else {**sizes, "head_dim": dim}


# Name -> (class in transformers, configuration). Between them: MHA, GQA, MQA; head dims that are not
# hidden / heads; tied and untied; biases; windows; dense and sparse layers mixed; every supported rope.
RECIPES: dict[str, tuple[str, dict[str, object]]] = {
    "llama-gqa-tied": ("Llama", {**heads(6, 2), "tie_word_embeddings": True}),
    "llama-mha-biases": ("Llama", {**heads(3, 3, 10), "attention_bias": True, "mlp_bias": True}),
    "llama-mqa-llama3": ("Llama", {**heads(4, 1, 20), "rope_parameters": LLAMA3_ROPE}),
    "mistral-window": ("Mistral", {**heads(6, 3, 14), "sliding_window": 7}),
    "mistral-full-linear": (
        "Mistral",
        {
            **heads(4, 2),
            "sliding_window": None,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "qwen2-window-layers": (
        "Qwen2",
        {
            **heads(6, 2),
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-full-dynamic": (
        "Qwen2",
        {**heads(4, 4), "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen3-odd": ("Qwen3", {**heads(5, 5, 18), "attention_bias": True}),
    "qwen3-yarn": (
        "Qwen3",
        {
            **heads(6, 2, 12),
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 20.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "phi3-window": ("Phi3", {**heads(4, 2), "pad_token_id": 0, "sliding_window": 7}),
    "phi3-longrope-partial": (
        "Phi3",
        {
            **heads(6, 2),
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 512,
        },
    ),
    "mixtral": ("Mixtral", {**heads(6, 2), "num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": (
        "Mixtral",
        {**heads(4, 1, 16), "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 6},
    ),
    "qwen2-moe-mixed": (
        "Qwen2Moe",
        {
            **heads(6, 3),
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 14,
            "shared_expert_intermediate_size": 22,
            "mlp_only_layers": [1],
        },
    ),
    "qwen2-moe-norm-window": (
        "Qwen2Moe",
        {
            **heads(4, 2),
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 16,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {
            **heads(6, 2, 10),
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 15,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen3-moe-sparse": (
        "Qwen3Moe",
        {**heads(5, 5, 8), "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 9},
    ),
}


# Routings that chance does not give: name -> (recipe, its changes, for each expert the row of its router and a factor).
# Of two experts with opposite rows exactly one has a positive score.
ROUTINGS: dict[str, tuple[str, dict[str, object], tuple[tuple[int, float], ...]]] = {
    # Expert 0 or 1, never 2.
    "mixtral-idle-expert": ("mixtral-window", {}, ((0, 1.0), (0, -1.0), (0, 0.0))),
    # Expert 0 always, and 1 or 2.
    "mixtral-busy-expert": ("mixtral", {"num_local_experts": 3}, ((1, 0.0), (1, 1.0), (1, -1.0))),
}


def build(recipe: str, **overrides: object) -> transformers.PreTrainedModel:
    if recipe in ROUTINGS:
        base, fields, rows = ROUTINGS[recipe]
        model = build(base, **{**fields, **overrides})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".gate.weight"):
                    parameter.copy_(torch.stack([factor * parameter[row] for row, factor in rows]))
        return model
    family, fields = RECIPES[recipe]
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**{**BASE, **fields, **overrides})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if "Moe" in family or family == "Mixtral":
        # Its grouped matrix product wants rows of 16 bytes, which odd expert widths have not.
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            # Wider than transformers' own start, so that a wrong weight anywhere moves the logits.
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.uniform_(-0.5, 1.5)
    return model


def save_tokenizer(folder: Path, vocab_size: int = VOCAB) -> None:
    """Write a tokenizer whose words are `w0`, `w1`, ...: the ids of a text can be read off it."""
    words = {f"w{number}": number for number in range(vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(folder)


def save(recipe: str, folder: Path, **overrides: object) -> Path:
    """Write a recipe's model with a tokenizer to `folder`, ready to be served; returns it.

    Its layers weigh more beside the embedding than in `build`, so that greedy answers vary with the context.
    """
    model = build(recipe, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(1 / 6 if "embed_tokens" in name else 2)
    model.save_pretrained(folder)
    save_tokenizer(folder, model.config.vocab_size)
    return folder
