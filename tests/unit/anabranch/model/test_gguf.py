"""GGUF files: names, llama.cpp's row order, experts, quantised rows, rope factors, and broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize

from anabranch.errors import CheckpointError, UnsupportedArchitecture
from anabranch.model.sources import resolve_model
from anabranch.parallel.threads import run_ranks

pytestmark = pytest.mark.unit

ARCHITECTURES = {"Llama": "llama", "Mixtral": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Qwen2Moe": "qwen2moe"}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
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
Q8_0 = GGMLQuantizationType.Q8_0
WIDE = {"head_dim": 32}
SHAPE = {"hidden_size": 64, "intermediate_size": 96}


def llama_cpp_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The permutation of llama.cpp's converter."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: torch.nn.Module, *, kind=None, factors=None, skip: str = "", tokens=None) -> None:
    """Write what llama.cpp's converter would. Quantised weights are put back into `model`, so that it stays equal."""
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
    for token, number in (tokens or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{token}_token_id", number)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
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


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("llama-gqa-tied", {"hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 64}),
        ("llama-mqa-llama3", {**SHAPE, "head_dim": 24, "rope_parameters": None}),
        ("qwen2-full-dynamic", {**SHAPE, "rope_parameters": None}),
        ("qwen3-odd", {**SHAPE, **WIDE, "attention_bias": False}),
        ("mixtral", {**SHAPE, "num_attention_heads": 4}),
        (
            "qwen2-moe-norm-window",
            {
                **SHAPE,
                "use_sliding_window": False,
                "qkv_bias": True,
                "norm_topk_prob": False,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 64,
            },
        ),
    ],
)
@pytest.mark.parametrize("kind", [None, Q8_0])
def test_gguf_of_each_family_equals_transformers(
    recipe, overrides, kind, make_model, load, session, prompt, reference_tokens, tmp_path
) -> None:
    _, reference = make_model(recipe, **overrides)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, reference, kind=kind)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    model = load(path)
    torch.testing.assert_close(session(model).feed(prompt), expected, atol=2e-4, rtol=1e-4)
    assert session(model).generate(prompt, 20) == reference_tokens(reference, prompt, 20)


def test_ranks_read_their_own_rows_of_a_gguf(make_model, load, session, prompt, reference_tokens, tmp_path) -> None:
    _, reference = make_model("mixtral", **SHAPE, num_attention_heads=8, num_key_value_heads=4)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, reference, kind=Q8_0)
    expected = reference_tokens(reference, prompt, 20)
    for tokens in run_ranks(3, lambda group: session(load(path, group)).generate(prompt, 20)):
        assert tokens == expected


def test_rope_factors_are_llama3_scaling(make_model, load, session, prompt, tmp_path) -> None:
    _, reference = make_model("llama-mqa-llama3")
    scaled = reference.model.rotary_emb.inv_freq
    config = reference.config.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).model.rotary_emb.inv_freq
    assert not torch.equal(plain, scaled)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, reference, factors=(plain / scaled).tolist())
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(session(load(path)).feed(prompt), expected, atol=2e-4, rtol=1e-4)


@pytest.fixture
def tiny(make_model, tmp_path) -> Path:
    _, reference = make_model("llama-gqa-tied")
    write_gguf(tmp_path / "tiny.gguf", reference)
    return tmp_path / "tiny.gguf"


def test_end_and_begin_of_sequence_come_from_the_metadata(make_model, tmp_path) -> None:
    _, reference = make_model("qwen2-full-dynamic")
    write_gguf(tmp_path / "tiny.gguf", reference, tokens={"eos": 5, "eot": 9, "bos": 3})
    config = resolve_model(str(tmp_path / "tiny.gguf")).config()
    assert (config.eos_token_ids, config.bos_token_id) == ((5, 9), 3)
    assert config.architecture == "Qwen2ForCausalLM"


@pytest.mark.parametrize("keep", [0, 3, 30, 400, 5000, -100])
def test_truncated_gguf(tiny, load, keep) -> None:
    tiny.write_bytes(tiny.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: not a whole GGUF file"):
        load(tiny)


def test_something_else_under_the_gguf_name(tiny, load) -> None:
    tiny.write_bytes(b"<html>" * 1000)
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        load(tiny)


def test_missing_gguf_tensor(make_model, load, tmp_path) -> None:
    _, reference = make_model("llama-gqa-tied")
    write_gguf(tmp_path / "tiny.gguf", reference, skip="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight \[40, 48\] is missing"):
        load(tmp_path / "tiny.gguf")


def test_unsupported_gguf_architecture(tmp_path, load) -> None:
    writer = GGUFWriter(tmp_path / "tiny.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedArchitecture, match="'mamba' is not supported; supported are llama"):
        load(tmp_path / "tiny.gguf")


def test_missing_gguf_metadata(tmp_path, load) -> None:
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"llama\.attention\.head_count is missing"):
        load(tmp_path / "tiny.gguf")
