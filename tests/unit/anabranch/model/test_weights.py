"""Reading safetensors by slice, in every layout that checkpoints come in."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from anabranch.model import weights as weights_module
from anabranch.model.digest import weights_digest
from anabranch.model.weights import INDEX_NAME, SINGLE_NAME, SafetensorsFolder

pytestmark = pytest.mark.unit


def test_only_the_slice_is_read(tmp_path) -> None:
    whole = torch.randn(12, 10)
    save_file({"a": whole, "b": torch.randn(3)}, tmp_path / SINGLE_NAME)
    with SafetensorsFolder(tmp_path) as source:
        assert set(source.names()) == {"a", "b"}
        assert source.shape("a") == (12, 10)
        part = source.read("a", (slice(2, 5), slice(4, 10)))
        assert torch.equal(part, whole[2:5, 4:10])
        assert torch.equal(source.read("a"), whole)


def test_a_long_read_maps_the_file_afresh(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(weights_module, "MAX_MAPPED_BYTES", 100)
    tensors = {f"t{i}": torch.full((40,), float(i)) for i in range(6)}
    save_file(tensors, tmp_path / SINGLE_NAME)
    with SafetensorsFolder(tmp_path) as source:
        for name, tensor in tensors.items():
            assert torch.equal(source.read(name), tensor)


def test_sharded_checkpoint_gives_the_same_model(make_model, load, session, prompt) -> None:
    folder, _ = make_model("qwen2-moe-mixed", shard_size="20KB")
    index = json.loads((folder / INDEX_NAME).read_text())
    assert len(set(index["weight_map"].values())) > 3
    expected = session(load(folder)).feed(prompt)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
        shard.unlink()
    (folder / INDEX_NAME).unlink()
    save_file(tensors, folder / SINGLE_NAME)
    assert torch.equal(session(load(folder)).feed(prompt), expected)


@pytest.mark.parametrize("recipe", ["mixtral", "qwen3-moe-mixed"])
def test_fused_experts_give_the_same_model(recipe, make_model, load, session, prompt) -> None:
    """The names that transformers' modules use in memory, one tensor for all experts of a layer."""
    folder, reference = make_model(recipe)
    expected = session(load(folder)).feed(prompt)
    save_file({name: tensor.contiguous() for name, tensor in reference.state_dict().items()}, folder / SINGLE_NAME)
    assert any(name.endswith("experts.gate_up_proj") for name in reference.state_dict())
    assert torch.equal(session(load(folder)).feed(prompt), expected)


def test_low_precision_files_are_converted_on_the_way(make_model, load) -> None:
    folder, _ = make_model("llama-gqa-tied")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / SINGLE_NAME).items()}
    save_file(tensors, folder / SINGLE_NAME)
    model = load(folder)
    assert model.attention.norm_C.dtype == torch.float32
    assert torch.equal(model.attention.norm_C, tensors["model.norm.weight"].float())


def test_digest_follows_values_and_not_files(make_model) -> None:
    folder, _ = make_model("mixtral")
    with SafetensorsFolder(folder) as source:
        first = weights_digest(source)
    tensors = load_file(folder / SINGLE_NAME)
    save_file(dict(reversed(tensors.items())), folder / SINGLE_NAME)
    with SafetensorsFolder(folder) as source:
        assert weights_digest(source) == first
    tensors["model.layers.2.self_attn.v_proj.weight"][0, 0] += 1.0
    save_file(tensors, folder / SINGLE_NAME)
    with SafetensorsFolder(folder) as source:
        assert weights_digest(source) != first
