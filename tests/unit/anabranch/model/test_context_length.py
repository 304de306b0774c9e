"""How long a model's context is: the trained length, and what each rotary scaling makes of it."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from gguf import GGUFWriter

from anabranch.errors import CheckpointError, UnsupportedArchitecture
from anabranch.model.sources import resolve_model
from tests.support.families import LLAMA3_ROPE, VOCAB
from tests.support.gguf import write_gguf

pytestmark = pytest.mark.unit

# All recipes are trained to 128 tokens.
LONG = [(5 * i * i + 7 * i + 3) % VOCAB for i in range(300)]
ROPE = {"rope_theta": 1e4, "factor": 4.0}


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
    with torch.inference_mode():
        expected = reference(torch.tensor([LONG])).logits[0]
    model = load(folder)
    torch.testing.assert_close(session(model).feed(LONG), expected, atol=3e-4, rtol=1e-4)
    assert session(model).generate(LONG, 12) == reference_tokens(reference, LONG, 12)


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
