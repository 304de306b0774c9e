"""GGUF files as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, dequantize, quantize

ARCHITECTURES = {
    "Llama": "llama",
    "Mixtral": "llama",
    "Phi3": "phi3",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Qwen2Moe": "qwen2moe",
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": "",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def llama_cpp_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The permutation of llama.cpp's converter."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def add_phi3(writer: GGUFWriter, model: torch.nn.Module) -> None:
    """The metadata and tensors of this architecture alone."""
    config, rope = model.config, model.config.rope_parameters
    writer.add_rope_dimension_count(2 * len(model.model.rotary_emb.inv_freq))
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_attn_factors(model.model.rotary_emb.attention_scaling)
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], dtype=np.float32))


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    *,
    kind: GGMLQuantizationType | None = None,
    factors: Sequence[float] | None = None,
    skip: str = "",
    tokens: Mapping[str, int] | None = None,
    metadata: Callable[[GGUFWriter], None] = lambda writer: None,
) -> None:
    """Write what llama.cpp's converter would. Quantised weights are put back into `model`, so that it stays equal.

    Args:
        kind: what matrices are quantised to; None: they stay as they are.
        factors: divisors of the rotary frequencies.
        skip: the tensor, by its Hugging Face name, that is left out.
        tokens: special tokens' ids, by their names in the metadata.
        metadata: adds what else the file is to say.
    """
    config = model.config
    name = ARCHITECTURES[type(model).__name__.removesuffix("ForCausalLM")]
    writer = GGUFWriter(path, name)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    metadata(writer)
    for token, number in (tokens or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{token}_token_id", number)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
    if name == "phi3":
        add_phi3(writer, model)
    if hasattr(config, "num_experts_per_tok"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)

    def add(gguf_name: str, tensor: torch.Tensor, target: torch.Tensor) -> None:
        data = tensor.detach().numpy()
        for part, heads in (("attn_q.", config.num_attention_heads), ("attn_k.", config.num_key_value_heads)):
            if name == "llama" and part in gguf_name:
                data = llama_cpp_rows(data, heads)
        if kind is None or tensor.dim() < 2 or "gate_inp" in gguf_name:
            writer.add_tensor(gguf_name, data.copy())
            return
        packed = quantize(data, kind)
        writer.add_tensor(gguf_name, packed, raw_dtype=kind)
        rounded = dequantize(packed, kind)
        if "attn_q." in gguf_name or "attn_k." in gguf_name:
            heads = config.num_attention_heads if "attn_q." in gguf_name else config.num_key_value_heads
            if name == "llama":
                pairs = rounded.reshape(heads, -1, 2, rounded.shape[-1])
                rounded = pairs.swapaxes(1, 2).reshape(rounded.shape)
        with torch.no_grad():
            target.copy_(torch.from_numpy(rounded.copy()))

    for hf_name, tensor in model.state_dict().items():
        if hf_name == skip or (hf_name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if hf_name == "lm_head.weight":
            add("output.weight", tensor, tensor)
        elif hf_name in TOP:
            add(TOP[hf_name], tensor, tensor)
        else:
            _, _, layer, rest = hf_name.split(".", 3)
            stem, _, suffix = rest.rpartition(".") if rest.endswith((".weight", ".bias")) else (rest, "", "weight")
            if stem == "mlp.experts.gate_up_proj":
                gate, up = tensor.chunk(2, dim=1)
                add(f"blk.{layer}.ffn_gate_exps.weight", gate, gate)
                add(f"blk.{layer}.ffn_up_exps.weight", up, up)
            else:
                add(f"blk.{layer}.{NAMES[stem]}.{suffix}", tensor, tensor)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary(
    writer: GGUFWriter,
    tokens: Sequence[str],
    *,
    model: str = "gpt2",
    pre: str = "gpt-2",
    merges: Sequence[str] = (),
    scores: Sequence[float] = (),
    kinds: Mapping[str, TokenType] | None = None,
    ids: Mapping[str, int] | None = None,
    flags: Mapping[str, bool] | None = None,
    chat_template: str = "",
) -> None:
    """Add a tokenizer to a file's metadata.

    Args:
        kinds: of tokens that are not normal.
        ids: special tokens' ids, by their names in the metadata.
        flags: what is put around or before a text, by its name in the metadata.
    """
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    if merges:
        writer.add_token_merges(list(merges))
    if scores:
        writer.add_token_scores(list(scores))
    writer.add_token_types([(kinds or {}).get(token, TokenType.NORMAL) for token in tokens])
    for name, number in (ids or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, value in (flags or {}).items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    if chat_template:
        writer.add_chat_template(chat_template)
