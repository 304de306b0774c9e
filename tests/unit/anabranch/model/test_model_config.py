"""What families translate to, and what a configuration answers."""

from __future__ import annotations

import json

import msgspec
import pytest

from anabranch.errors import CheckpointError
from anabranch.model.config import ModelConfig, RopeConfig
from anabranch.model.sources import resolve_model

pytestmark = pytest.mark.unit


def config_of(make_model, recipe: str, **overrides: object) -> ModelConfig:
    return resolve_model(str(make_model(recipe, **overrides)[0])).config()


def test_windows_of_each_family(make_model) -> None:
    assert config_of(make_model, "llama-gqa-tied").windows == (None, None, None)
    assert config_of(make_model, "mistral-window").windows == (7, 7, 7)
    assert config_of(make_model, "qwen2-window-layers").windows == (None, 5, 5)
    assert config_of(make_model, "qwen2-moe-norm-window").windows == (6, None, 6)
    assert config_of(make_model, "qwen2-full-dynamic").windows == (None, None, None)


def test_sparse_layers_of_each_family(make_model) -> None:
    mixed = config_of(make_model, "qwen2-moe-mixed")
    assert [mixed.is_sparse(layer) for layer in range(3)] == [True, False, True]
    assert mixed.moe is not None
    assert (mixed.moe.shared_expert_intermediate, mixed.moe.norm_topk_prob, mixed.moe.top_k) == (22, False, 3)
    stepped = config_of(make_model, "qwen3-moe-mixed")
    assert [stepped.is_sparse(layer) for layer in range(3)] == [False, True, False]
    assert not config_of(make_model, "qwen3-odd").is_sparse(0)


def test_head_dim_may_differ_from_hidden_over_heads(make_model) -> None:
    config = config_of(make_model, "qwen3-odd")
    assert (config.hidden_size, config.num_heads, config.head_dim, config.qk_norm) == (48, 5, 18, True)


def test_generation_config_goes_before_the_models_end_of_sequence(make_model) -> None:
    folder, _ = make_model("llama-gqa-tied")
    assert resolve_model(str(folder)).config().eos_token_ids == (2,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert resolve_model(str(folder)).config().eos_token_ids == (7, 9)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ["x"]}))
    with pytest.raises(CheckpointError, match="token ids"):
        resolve_model(str(folder)).config()


def test_fingerprint_is_stable_and_follows_every_field(make_model) -> None:
    config = config_of(make_model, "mixtral")
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=ModelConfig)
    assert again == config
    assert again.fingerprint() == config.fingerprint()
    assert len(config.fingerprint()) == 32
    for change in ({"rms_eps": 1e-7}, {"weights_digest": "ab"}, {"eos_token_ids": (3,)}):
        assert msgspec.structs.replace(config, **change).fingerprint() != config.fingerprint()


def test_contradictions_are_refused(make_model) -> None:
    config = config_of(make_model, "llama-gqa-tied")
    for change, message in (
        ({"num_kv_heads": 4}, "no multiple"),
        ({"windows": (None,)}, "1 windows for 3 layers"),
        ({"windows": (None, 0, None)}, "at least 1 token"),
        ({"rope": RopeConfig(kind="default", inv_freq=())}, "rotary frequencies"),
        ({"rope": RopeConfig(kind="default", inv_freq=(1.0,) * 5)}, "5 rotary frequencies turn 10 of 8 features"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            msgspec.structs.replace(config, **change)


@pytest.mark.parametrize(("share", "expected"), [(0.25, 2), (0.5, 4), (0.4, None), (0.1, None)])
def test_a_part_of_each_head_is_turned_in_pairs(make_model, share: float, expected: int | None) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}
    folder, _ = make_model("phi3-window", hidden_size=32, rope_parameters=rope)
    if expected is None:
        with pytest.raises(CheckpointError, match=f"head_dim 8 times partial_rotary_factor {share} is . features"):
            resolve_model(str(folder)).config()
    else:
        assert resolve_model(str(folder)).config().rope.rotary_dim == expected
