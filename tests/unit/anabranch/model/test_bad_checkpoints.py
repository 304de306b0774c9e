"""Broken checkpoints and configurations are refused by name: the file, the tensor, what was expected and found."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from anabranch.errors import CheckpointError, UnsupportedArchitecture
from anabranch.model.weights import INDEX_NAME, SINGLE_NAME

pytestmark = pytest.mark.unit

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(make_model):
    return make_model("llama-gqa-tied")[0]


def relabel(path, name: str, **changes: object) -> None:
    """Change what a safetensors header says of a tensor, and nothing else."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[name].update(changes)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit(path, **changes: object) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(folder, load, keep) -> None:
    path = folder / SINGLE_NAME
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        load(folder)


def test_something_else_under_the_name(folder, load) -> None:
    (folder / SINGLE_NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(folder)


def test_label_of_another_width(folder, load) -> None:
    relabel(folder / SINGLE_NAME, Q_PROJ, dtype="F16")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(folder)


def test_label_of_integers(folder, load) -> None:
    relabel(folder / SINGLE_NAME, Q_PROJ, dtype="I32")
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ} has dtype I32, expected one of"):
        load(folder)


def test_label_of_another_shape(folder, load) -> None:
    relabel(folder / SINGLE_NAME, Q_PROJ, shape=[96, 24])
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ} has shape \[96, 24\], the configuration expects \[48, 48\]"):
        load(folder)


def test_missing_tensor(folder, load) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    del tensors[Q_PROJ]
    save_file(tensors, folder / SINGLE_NAME)
    with pytest.raises(CheckpointError, match=rf"tensor {Q_PROJ} \[48, 48\] is missing"):
        load(folder)


def test_missing_expert(make_model, load) -> None:
    folder, _ = make_model("qwen3-moe-sparse")
    tensors = load_file(folder / SINGLE_NAME)
    del tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
    save_file(tensors, folder / SINGLE_NAME)
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight \[9, 48\] is missing"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 42}, r"has shape \[101, 48\], the configuration expects \[101, 42\]"),
        ({"vocab_size": 120}, r"has shape \[101, 48\], the configuration expects \[120, 48\]"),
        ({"num_key_value_heads": 3}, r"k_proj\.weight has shape \[16, 48\], the configuration expects \[24, 48\]"),
        ({"intermediate_size": 64}, r"the configuration expects \[64, 48\]"),
        ({"num_hidden_layers": 4}, r"model\.layers\.3\.input_layernorm\.weight \[48\] is missing"),
        ({"num_hidden_layers": 2}, r"model\.layers\.2\.\S+ and 8 more: .* 2 layers has no place for it"),
        ({"attention_bias": True}, r"q_proj\.bias \[48\] is missing"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight \[101, 48\] is missing"),
        ({"num_key_value_heads": 4}, "6 query heads are no multiple of 4 KV heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number from 1"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope"),
    ],
)
def test_configuration_that_disagrees(folder, load, change, message) -> None:
    edit(folder / "config.json", **change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_more_chosen_experts_than_there_are(make_model, load) -> None:
    folder, _ = make_model("mixtral")
    edit(folder / "config.json", num_experts_per_tok=6)
    with pytest.raises(CheckpointError, match="cannot choose 6 of 5 experts"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"llama"', "\x00"])
def test_malformed_configuration(folder, load, text) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel .*supported are Llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"}, "model type 'mistral'"),
        ({"architectures": None, "model_type": "brand_new"}, "brand_new"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            "rope_type: 'proportional' is not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor: only 1.0 is supported with model type 'llama'",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(folder, load, change, message) -> None:
    edit(folder / "config.json", **change)
    with pytest.raises(UnsupportedArchitecture, match=message):
        load(folder)


def test_layer_kind_that_is_not_supported(make_model, load) -> None:
    folder, _ = make_model("qwen2-window-layers")
    edit(folder / "config.json", layer_types=["full_attention", "chunked_attention", "full_attention"])
    with pytest.raises(UnsupportedArchitecture, match="chunked_attention"):
        load(folder)


def test_no_weights_at_all(folder, load) -> None:
    (folder / SINGLE_NAME).rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load(folder)


def test_pickled_weights_are_not_read(folder, load) -> None:
    (folder / SINGLE_NAME).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled"):
        load(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not readable as JSON"),
        ('{"weight_map": [1]}', "not an index"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "no file name"),
        ('{"weight_map": {"a": 3}}', "no file name"),
        ('{"weight_map": {"a": "model-00009.safetensors"}}', r"model-00009\.safetensors: the file is missing"),
        ('{"weight_map": {"a": "model.safetensors"}}', "a is missing, which"),
    ],
)
def test_bad_index(folder, load, index, message) -> None:
    (folder / INDEX_NAME).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_old_derived_tensors_are_ignored(folder, load) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / SINGLE_NAME)
    assert len(load(folder).ffn.layers) == 3
