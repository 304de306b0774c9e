"""How long a model's context is: the trained length, and what each rotary scaling makes of it."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from gguf import GGUFWriter

from anabranch.errors import CheckpointError, UnsupportedArchitecture
from anabranch.model.sources import resolve_model
from tests.support.families import LLAMA3_ROPE, LONGROPE, VOCAB
from tests.support.gguf import write_gguf

pytestmark = pytest.mark.unit

# All recipes are trained to 128 tokens.
LONG = [(5 * i * i + 7 * i + 3) % VOCAB for i in range(300)]
ROPE = {"rope_theta": 1e4, "factor": 4.0}
ORIGINAL = "original_max_position_embeddings"


def check_long(model, reference, session, reference_tokens, prompt: list[int]) -> None:
    """Logits of every position, and twelve greedy tokens."""
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(session(model).feed(prompt), expected, atol=3e-4, rtol=1e-4)
    assert session(model).generate(prompt, 12) == reference_tokens(reference, prompt, 12)


def limit(make_model, **rope: object) -> int:
    folder, _ = make_model("llama-gqa-tied", rope_parameters={"rope_theta": 1e4, **rope})
    return resolve_model(str(folder)).config().max_context


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 128),
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "linear", "factor": 2.5}, 320),
        ({"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({**LLAMA3_ROPE, "factor": 8.0}, 128),
    ],
)
def test_a_scaling_stretches_the_original_length(make_model, rope, expected, caplog) -> None:
    assert limit(make_model, **rope) == expected
    assert not [record for record in caplog.records if record.name.startswith("anabranch")]


def test_a_limit_below_the_configurations_own_says_so(make_model, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert limit(make_model, rope_type="yarn", factor=2.0, original_max_position_embeddings=32) == 64
        assert limit(make_model, rope_type="dynamic", factor=4.0) == 128
    said = [record.getMessage() for record in caplog.records if record.name == "anabranch.model.context_length"]
    assert said == [
        "rope_type yarn: 64 tokens of context are served, the original length times factor 2, not the 128 of "
        "max_position_embeddings",
        "rope_type dynamic: 128 tokens of context are served, the trained length, not the 512 that factor 4 would "
        "reach",
    ]


@pytest.mark.parametrize(
    ("recipe", "rope"),
    [
        ("llama-gqa-tied", {"rope_type": "yarn", "original_max_position_embeddings": 128}),
        ("llama-gqa-tied", {"rope_type": "linear"}),
        ("qwen3-odd", {"rope_type": "yarn"}),
        ("mistral-window", {"rope_type": "linear"}),
    ],
)
def test_a_prompt_past_the_trained_length_equals_transformers(
    recipe, rope, make_model, load, session, reference_tokens
) -> None:
    folder, reference = make_model(recipe, rope_parameters={**ROPE, **rope})
    assert resolve_model(str(folder)).config().max_context == 512
    check_long(load(folder), reference, session, reference_tokens, LONG)


@pytest.mark.parametrize(
    "rope",
    [
        # Llama 3.1, 3.2 and 3.3 in small: wavelengths below, between and above both bounds.
        {"rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 32},
        {"rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 32},
        {"rope_theta": 1e3, "factor": 2.5, "low_freq_factor": 0.5, "high_freq_factor": 8.0, ORIGINAL: 100},
        {"rope_theta": 1e4, "factor": 16.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0, ORIGINAL: 7},
        # No wavelength lies between the bounds; none is scaled at all.
        {"rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 2.0, ORIGINAL: 64},
        {"rope_theta": 1e4, "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 512},
    ],
)
@pytest.mark.parametrize("recipe", ["llama-gqa-tied", "llama-mqa-llama3"])
def test_llama3_scaling_equals_transformers_past_the_original_length(
    recipe, rope, make_model, load, session, reference_tokens
) -> None:
    folder, reference = make_model(recipe, rope_parameters={"rope_type": "llama3", **rope}, max_position_embeddings=512)
    assert resolve_model(str(folder)).config().max_context == 512
    check_long(load(folder), reference, session, reference_tokens, LONG)


@pytest.mark.parametrize(
    "rope",
    [
        {"beta_fast": 8.0, "beta_slow": 2.0},
        {"attention_factor": 0.7},
        {"mscale": 0.8, "mscale_all_dim": 0.4},
        {"truncate": False},
        {"factor": 10.0, ORIGINAL: 48},
    ],
)
def test_yarn_variants_equal_transformers_past_the_original_length(
    rope, make_model, load, session, reference_tokens
) -> None:
    yarn = {**ROPE, "rope_type": "yarn", ORIGINAL: 128, **rope}
    folder, reference = make_model("llama-gqa-tied", rope_parameters=yarn, max_position_embeddings=512)
    check_long(load(folder), reference, session, reference_tokens, LONG)


def longrope(make_model, original: int, **overrides: object):
    rope = {key: value for key, value in LONGROPE.items() if key != "factor"}
    return make_model(
        "phi3-longrope-partial", rope_parameters=rope, original_max_position_embeddings=original, **overrides
    )


def test_longrope_is_served_up_to_the_original_length(make_model, load, session, reference_tokens, caplog) -> None:
    folder, reference = longrope(make_model, 96, max_position_embeddings=512)
    with caplog.at_level(logging.WARNING):
        config = resolve_model(str(folder)).config()
    assert config.max_context == 96
    assert (config.rope.kind, config.rope.rotary_dim, config.head_dim) == ("longrope", 6, 8)
    # The longer context that was trained for scales cos and sin of the short factors too.
    assert config.rope.attention_scaling == pytest.approx(math.sqrt(1 + math.log(512 / 96) / math.log(96)))
    said = [record.getMessage() for record in caplog.records if record.name == "anabranch.model.context_length"]
    assert said == [
        "rope_type longrope: 96 tokens of context are served, the original length that the short factors are for, "
        "not the 512 of max_position_embeddings"
    ]
    # Prompt and answer fill the context to its last token.
    check_long(load(folder), reference, session, reference_tokens, LONG[:84])


def test_longrope_that_is_never_long_is_served_whole(make_model, caplog) -> None:
    for original in (128, 512):
        folder, _ = longrope(make_model, original)
        assert resolve_model(str(folder)).config().max_context == 128
    assert not [record for record in caplog.records if record.name.startswith("anabranch")]


def test_other_families_scale_by_longrope_too(make_model, load, session, reference_tokens) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.2, 1.5, 2.0],
        "long_factor": [2.0, 3.0, 5.0, 9.0],
        ORIGINAL: 96,
    }
    folder, reference = make_model("llama-gqa-tied", rope_parameters=rope)
    assert resolve_model(str(folder)).config().max_context == 96
    check_long(load(folder), reference, session, reference_tokens, LONG[:84])


def test_longrope_as_old_files_of_phi3_write_it(make_model) -> None:
    folder, _ = longrope(make_model, 96)
    expected = resolve_model(str(folder)).config()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("yarn", "longrope"):
        rope = config["rope_parameters"]
        config |= {
            "rope_parameters": None,
            "rope_theta": rope["rope_theta"],
            "partial_rotary_factor": rope["partial_rotary_factor"],
            "rope_scaling": {key: rope[key] for key in ("short_factor", "long_factor")} | {"type": name},
        }
        path.write_text(json.dumps(config))
        assert resolve_model(str(folder)).config() == expected, name
        config["rope_parameters"] = rope


@pytest.mark.parametrize("key", ["short_factor", "long_factor"])
@pytest.mark.parametrize("value", [None, 2.0, [1.0, 1.1], [1.0] * 4, [1.0, 0, 1.0], [1.0, -1.0, 1.0], [1, "1", 1]])
def test_factors_of_longrope_that_are_none_are_named(make_model, key, value) -> None:
    folder, _ = longrope(make_model, 96)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"(?s)config.*\W{key}\W"):
        resolve_model(str(folder)).config()


@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic", "llama3"])
@pytest.mark.parametrize("factor", [0, -4.0, 0.5, "4", True, float("inf"), float("nan")])
def test_a_factor_that_stretches_nothing_is_named(make_model, kind, factor) -> None:
    folder, _ = make_model("llama-mqa-llama3")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] |= {"rope_type": kind, "factor": factor}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"rope_parameters(: |\.)factor is .*; it must be a number"):
        resolve_model(str(folder)).config()


def test_an_original_length_of_nothing_is_named(make_model) -> None:
    folder, _ = make_model("qwen3-yarn")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["original_max_position_embeddings"] = 0
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="rope_parameters: original_max_position_embeddings is 0; it must be"):
        resolve_model(str(folder)).config()


# GGUF --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gguf(make_model, tmp_path):
    """`gguf(keys, **rope) -> (path, transformers model with these rope_parameters)`."""

    def make(keys: dict[str, object], **rope: object):
        _, reference = make_model("llama-gqa-tied", rope_parameters={"rope_theta": 1e4, **rope})
        path = tmp_path / "tiny.gguf"

        def scaling(writer: GGUFWriter) -> None:
            for key, value in keys.items():
                add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
                add(f"llama.rope.{key}", value)

        write_gguf(path, reference, metadata=scaling)
        return path, reference

    return make


YARN = {"rope_type": "yarn", "factor": 4.0}
YARN_KEYS = {"scaling.type": "yarn", "scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("keys", "rope", "expected"),
    [
        # Without an original length, the trained one is it, as in llama.cpp.
        (YARN_KEYS, YARN, 512),
        (
            {**YARN_KEYS, "scaling.original_context_length": 100},
            {**YARN, "original_max_position_embeddings": 100},
            400,
        ),
        (
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.yarn_beta_fast": 8.0,
                "scaling.yarn_beta_slow": 2.0,
            },
            {**YARN, "beta_fast": 8.0, "beta_slow": 2.0},
            512,
        ),
        (
            {**YARN_KEYS, "scaling.attn_factor": 0.5},
            {**YARN, "attention_factor": 0.5 * (0.1 * 1.3862943611198906 + 1.0)},
            512,
        ),
        ({"scaling.type": "linear", "scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}, 512),
        # A factor without a kind is linear; so is the old key.
        ({"scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}, 512),
        ({"scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}, 512),
        ({"scaling.type": "none", "scaling.factor": 4.0}, {"rope_type": "default"}, 128),
        ({"scaling.type": "linear"}, {"rope_type": "default"}, 128),
        ({}, {"rope_type": "default"}, 128),
    ],
)
def test_a_gguf_file_scales_as_transformers(gguf, load, session, keys, rope, expected) -> None:
    path, reference = gguf(keys, **rope)
    assert resolve_model(str(path)).config().max_context == expected
    prompt = LONG[: min(300, expected)]
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(session(load(path)).feed(prompt), logits, atol=3e-4, rtol=1e-4)


def test_a_gguf_scaling_that_is_not_known_is_named(gguf) -> None:
    path, _ = gguf({"scaling.type": "longrope", "scaling.factor": 4.0})
    with pytest.raises(UnsupportedArchitecture, match=r"llama\.rope\.scaling\.type 'longrope' is not supported"):
        resolve_model(str(path)).config()


def test_a_gguf_factor_below_one_is_named(gguf) -> None:
    path, _ = gguf({"scaling.type": "yarn", "scaling.factor": -4.0})
    with pytest.raises(CheckpointError, match=r"factor is -4\.0; it must be a number of at least 1"):
        resolve_model(str(path)).config()
