"""GGUF files: names, llama.cpp's row order, experts, quantised rows, rope factors, and broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter

from anabranch.errors import CheckpointError, UnsupportedArchitecture
from anabranch.model.load import check_weights
from anabranch.model.sources import resolve_model
from anabranch.parallel.threads import run_ranks
from tests.support.families import LONGROPE
from tests.support.gguf import write_gguf

pytestmark = pytest.mark.unit

Q8_0 = GGMLQuantizationType.Q8_0
Q4_1 = GGMLQuantizationType.Q4_1
WIDE = {"head_dim": 32}
SHAPE = {"hidden_size": 64, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("llama-gqa-tied", {"hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 64}),
        ("llama-mqa-llama3", {**SHAPE, "head_dim": 24, "rope_parameters": None}),
        ("qwen2-full-dynamic", {**SHAPE, "rope_parameters": None}),
        ("qwen3-odd", {**SHAPE, **WIDE, "attention_bias": False}),
        ("phi3-window", SHAPE),
        ("phi3-longrope-partial", {"hidden_size": 96, "num_attention_heads": 12, "intermediate_size": 64}),
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


@pytest.mark.parametrize("kind", [None, Q8_0, Q4_1])
@pytest.mark.parametrize("recipe", ["llama-gqa-tied", "mixtral"])
def test_no_rows_of_a_gguf_and_a_check_of_its_header(recipe, kind, make_model, tmp_path) -> None:
    """Before a model is loaded its header is checked, on the meta device: that reads no rows of each tensor."""
    _, reference = make_model(recipe, hidden_size=64, intermediate_size=96, num_attention_heads=4)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, reference, kind=kind)
    config, weights = resolve_model(str(path)).open()
    with weights:
        check_weights(config, weights)
        for name in weights.names():
            shape = weights.shape(name)
            assert weights.read(name, (slice(0, 0),)).shape == (0, *shape[1:]), name
            if len(shape) == 2:
                assert weights.read(name, (slice(0, 0), slice(0, 5))).shape == (0, 5)
                assert weights.read(name, (slice(1, 3), slice(0, 0))).shape == (2, 0)


@pytest.mark.parametrize("shape", [(2, 32), (5000,)])
def test_rope_factors_that_are_no_short_list_are_refused(shape, make_model, tmp_path) -> None:
    _, reference = make_model("llama-gqa-tied")
    path = tmp_path / "tiny.gguf"
    write_gguf(
        path, reference, metadata=lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(shape, np.float32))
    )
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight has shape .*; it must be a list of at most 4096"):
        resolve_model(str(path)).config()


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


def test_longrope_of_a_gguf_is_served_up_to_the_original_length(make_model, load, session, prompt, tmp_path) -> None:
    rope = {key: value for key, value in LONGROPE.items() if key != "factor"}
    _, reference = make_model("phi3-longrope-partial", rope_parameters=rope, original_max_position_embeddings=40)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, reference)
    config = resolve_model(str(path)).config()
    assert (config.max_context, config.rope.kind, config.rope.rotary_dim) == (40, "longrope", 6)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(session(load(path)).feed(prompt), expected, atol=2e-4, rtol=1e-4)


def test_what_a_gguf_says_of_rotary_embedding_and_is_not_computed_is_named(make_model, tmp_path) -> None:
    _, reference = make_model("qwen2-full-dynamic")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, reference, metadata=lambda writer: writer.add_rope_dimension_count(4))
    with pytest.raises(UnsupportedArchitecture, match=r"partial_rotary_factor: only 1\.0 .* 'qwen2'"):
        resolve_model(str(path)).config()
    _, reference = make_model("phi3-longrope-partial")

    def yarn(writer: GGUFWriter) -> None:
        writer.add_string("phi3.rope.scaling.type", "yarn")
        writer.add_float32("phi3.rope.scaling.factor", 4.0)

    write_gguf(path, reference, metadata=yarn)
    with pytest.raises(UnsupportedArchitecture, match=r"rope_factors_short\.weight .* beside scaling by 'yarn'"):
        resolve_model(str(path)).config()


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
