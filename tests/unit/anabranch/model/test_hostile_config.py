"""Configurations that would take all time or memory, or make transformers ask or run something: refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from anabranch.errors import CheckpointError, UnsupportedArchitecture
from anabranch.model.config import ModelConfig
from anabranch.model.config_bounds import MAX_LAYERS, checked_fields
from anabranch.model.json_files import read_json_object
from anabranch.model.sources import resolve_model

pytestmark = pytest.mark.unit

LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 14,
    "shared_expert_intermediate_size": 22,
}


def config_of(folder: Path, text: str | None = None, **changes: object) -> ModelConfig:
    (folder / "config.json").write_text(text if text is not None else json.dumps({**LLAMA, **changes}))
    return resolve_model(str(folder)).config()


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads", "head_dim"])
@pytest.mark.parametrize("value", [10**9, 10**15, 10**40, -1, 0, 3.5, "3", True, [3], float("nan"), float("inf")])
def test_sizes_out_of_bounds(tmp_path, key, value) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is .*; it must be a whole number from 1 to"):
        config_of(tmp_path, **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", 10**7),
        ("num_experts", 0),
        ("num_experts_per_tok", "2"),
        ("moe_intermediate_size", 1 << 21),
        ("shared_expert_intermediate_size", -1),
        ("decoder_sparse_step", 0),
        ("mlp_only_layers", list(range(5000))),
        ("mlp_only_layers", [True]),
        ("layer_types", ["full_attention"] * 5000),
        ("layer_types", [["full_attention"]]),
        ("max_window_layers", 1.5),
        ("sliding_window", -1),
        ("max_position_embeddings", 1 << 31),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", float("inf")),
        ("rope_theta", 0),
        ("rope_theta", "10000"),
        ("tie_word_embeddings", "false"),
        ("norm_topk_prob", 1),
        ("use_sliding_window", "no"),
        ("eos_token_id", list(range(5000))),
        ("eos_token_id", True),
        ("bos_token_id", 1.0),
        ("bos_token_id", -2),
        ("hidden_act", ["silu"]),
        ("hidden_act", "s" * 2000),
    ],
)
def test_other_values_out_of_bounds(tmp_path, key, value) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is .{{0,210}}; it must be") as caught:
        config_of(tmp_path, **{**MOE, key: value})
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": float("nan"), "rope_theta": 1e4},
        {"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4},
        {"rope_type": "linear", "factor": 1e300, "rope_theta": 1e4},
        {"rope_type": "default", "rope_theta": -1.0},
        {"rope_type": "default", "rope_theta": True},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": float("nan")},
        {"rope_type": "linear", "factor": [1.0] * 5000, "rope_theta": 1e4},
        {"rope_type": "x" * 2000},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 10**400},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": float("nan")},
        [1],
    ],
)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_ropes_out_of_bounds(tmp_path, key, rope) -> None:
    with pytest.raises(CheckpointError, match=r"rope|rotary"):
        config_of(tmp_path, **{key: rope})


def test_the_largest_is_read_at_once(tmp_path) -> None:
    assert config_of(tmp_path, num_hidden_layers=MAX_LAYERS).num_layers == MAX_LAYERS


def test_what_is_not_gone_by_never_reaches_transformers(tmp_path) -> None:
    """These would fill memory, ask a question on the terminal, read another file, or run the folder's code."""
    plain = config_of(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    config = config_of(
        tmp_path,
        num_labels=10**9,
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        configuration_files=["config.4.0.0.json"],
        attn_implementation="evil/kernel",
        torch_dtype="evil",
        id2label=[1],
    )
    assert config == plain


def test_families_with_layer_types_of_their_own_are_refused(tmp_path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="layer_types"):
        config_of(tmp_path, architectures=["MistralForCausalLM"], model_type="mistral", layer_types=["full_attention"])


@pytest.mark.parametrize("architectures", [[["LlamaForCausalLM"]], "LlamaForCausalLM", [5], ["x"] * 50])
def test_architectures_of_another_type(tmp_path, architectures) -> None:
    with pytest.raises(CheckpointError, match="architectures is"):
        config_of(tmp_path, architectures=architectures)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested deeper than 64 levels"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested deeper than 64 levels"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested deeper than 64 levels"),
        ('{"vocab_size":' + "1" * 5000 + "}", "not readable as JSON"),
        ('{"a":[' + "1," * 300_000 + "1]}", "values; at most 200,000 are read"),
        ("\ufeff{}", "not readable as JSON"),
    ],
)
def test_files_that_are_too_deep_or_too_many(tmp_path, text, message) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        config_of(tmp_path, text)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: .*{message}"):
        resolve_model(str(tmp_path)).config()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["FIFO", "device", "sparse", "not UTF-8"])
def test_what_is_no_small_regular_file(tmp_path, name, kind) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 512 << 20)
    else:
        path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=f"{name}: (cannot be read: it (is|has)|not readable as JSON)"):
        resolve_model(str(tmp_path)).config()


@pytest.mark.parametrize("value", [["x"], 1.5, True, [1] * 5000, 1 << 40])
def test_generation_token_ids(tmp_path, value) -> None:
    config_of(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is .*must be token ids"):
        resolve_model(str(tmp_path)).config()


def test_null_stands_for_a_familys_own_way() -> None:
    raw: dict[str, object] = {"head_dim": None, "sliding_window": None, "tie_word_embeddings": None, "left_out": 5}
    assert checked_fields("x", raw) == {"head_dim": None, "sliding_window": None}


def test_a_link_to_a_regular_file_is_followed(tmp_path) -> None:
    """As in the caches of Hugging Face."""
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "name.json").symlink_to(tmp_path / "blob")
    assert read_json_object(tmp_path / "name.json") == {"a": 1}
