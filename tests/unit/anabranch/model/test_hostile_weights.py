"""Weights that hang, lie or hold no numbers: refused by name, in the check that an orchestrator makes at its start."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anabranch.errors import CheckpointError
from anabranch.model.identity import read_identity
from anabranch.model.sources import resolve_model
from anabranch.model.weights import INDEX_NAME, SINGLE_NAME, SafetensorsFolder

pytestmark = pytest.mark.unit

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(make_model) -> Path:
    return make_model("llama-gqa-tied")[0]


def refused(folder: Path, message: str) -> None:
    """By the orchestrator's check, which loads nothing."""
    source = resolve_model(str(folder))
    with pytest.raises(CheckpointError, match=message):
        read_identity(source, source.config())


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change(folder: Path, name: str, alter: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    tensors[name] = alter(tensors[name]).contiguous()
    save_file(tensors, folder / SINGLE_NAME)


def test_a_whole_model_passes(folder) -> None:
    source = resolve_model(str(folder))
    assert len(read_identity(source, source.config()).model_fingerprint) == 32


@pytest.mark.parametrize("name", [SINGLE_NAME, INDEX_NAME])
@pytest.mark.parametrize("kind", ["FIFO", "device", "folder"])
def test_what_is_no_regular_file(folder, name, kind) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    refused(folder, f"{name}: cannot be read: it is a {kind}, not a regular file")


def test_shards_behind_links_are_read(make_model, load) -> None:
    """As in the caches of Hugging Face; but only under a name beside the index."""
    folder, _ = make_model("llama-gqa-tied", shard_size="20KB")
    (folder.parent / "blobs").mkdir()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    for number, shard in enumerate(shards):
        shard.rename(folder.parent / "blobs" / str(number))
        shard.symlink_to(Path("..") / "blobs" / str(number))
    assert len(load(folder).ffn.layers) == 3
    shards[1].unlink()
    shards[1].symlink_to("/dev/zero")
    refused(folder, rf"{shards[1].name}: cannot be read: it is a device")


@pytest.mark.parametrize(
    "file", ["/dev/zero", "../x.safetensors", "..", ".", "", "a/b.safetensors", "pytorch_model.bin", 3]
)
def test_an_index_that_leads_elsewhere(folder, file) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": file}}))
    refused(folder, r"index\.json: a points to .*, which is no file name ending in \.safetensors")


@pytest.mark.parametrize("file", ["a\0.safetensors", "x" * 300 + ".safetensors", "\ud800.safetensors"])
def test_an_index_of_names_that_no_file_has(folder, file) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": file}}))
    refused(folder, r"safetensors: cannot be read: ")


def test_an_index_of_512_megabytes(folder) -> None:
    (folder / INDEX_NAME).touch()
    os.truncate(folder / INDEX_NAME, 512 << 20)
    refused(folder, r"index\.json: cannot be read: it has more than 67,108,864 bytes")


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"weight_map":[' + "1," * 1_100_000 + "1]}"])
def test_an_index_too_deep_or_of_too_many(folder, text) -> None:
    (folder / INDEX_NAME).write_text(text)
    refused(folder, r"index\.json: (nested deeper|about 1,\d+,\d+ values)")


@pytest.mark.parametrize("length", [1 << 26, 1 << 40, (1 << 64) - 1])
def test_a_header_of_any_length(folder, length) -> None:
    with (folder / SINGLE_NAME).open("r+b") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(1 << 41)
    refused(folder, rf"not a whole safetensors file: its header would have {length:,} bytes")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 102}, r"embed_tokens\.weight has shape \[101, 48\], the configuration expects \[102, 48\]"),
        ({"num_key_value_heads": 3}, r"k_proj\.weight has shape \[16, 48\]"),
        ({"num_hidden_layers": 1000}, r"model\.layers\.3\.input_layernorm\.weight \[48\] is missing"),
        ({"num_hidden_layers": 2}, "2 layers has no place for it"),
        ({"intermediate_size": 41}, r"gate_proj\.weight has shape \[40, 48\], the configuration expects \[41, 48\]"),
        ({"hidden_size": 999_996}, r"the configuration expects \[101, 999996\]"),
    ],
)
def test_shapes_are_compared_without_loading(folder, changes, message) -> None:
    edit(folder, **changes)
    refused(folder, message)


def test_experts_are_compared_too(make_model) -> None:
    folder, _ = make_model("mixtral")
    edit(folder, num_local_experts=6)
    refused(folder, r"gate\.weight has shape \[5, 48\], the configuration expects \[6, 48\]")


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_a_derived_tensor_of_nothing_is_no_matter(folder, shape, load) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.empty(shape)
    save_file(tensors, folder / SINGLE_NAME)
    source = resolve_model(str(folder))
    assert read_identity(source, source.config())
    load(folder)


def test_dtypes_are_compared_without_loading(folder) -> None:
    change(folder, Q_PROJ, lambda tensor: tensor.to(torch.int32))
    refused(folder, rf"{Q_PROJ} has dtype I32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [Q_PROJ, "model.embed_tokens.weight", "model.norm.weight"])
def test_a_tensor_of_nothing_but_nan_is_seen_at_the_start(folder, name, value) -> None:
    change(folder, name, lambda tensor: torch.full_like(tensor, value))
    refused(folder, rf"{name} holds values that are not finite")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_single_value_is_seen_by_who_loads_it(folder, load, value) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[17, 3] = value
        return tensor

    change(folder, Q_PROJ, spoil)
    source = resolve_model(str(folder))
    read_identity(source, source.config())  # a sample of rows is all that is looked at here
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: {Q_PROJ} holds values that are not finite in float32"
    ):
        load(folder)


def test_a_value_of_an_expert_is_seen_by_who_loads_it(make_model, load) -> None:
    folder, _ = make_model("qwen3-moe-sparse")
    name = next(name for name in load_file(folder / SINGLE_NAME) if "experts" in name and "down_proj" in name)
    change(folder, name, lambda tensor: torch.full_like(tensor, float("nan")))
    with pytest.raises(CheckpointError, match=rf"{name} holds values that are not finite"):
        load(folder)


def test_a_value_too_large_for_the_dtype_is_named(folder, load) -> None:
    change(folder, Q_PROJ, lambda tensor: tensor * 0 + 1e6)
    load(folder)
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ} .* not finite in float16 .* choose a wider dtype"):
        load(folder, dtype=torch.float16)


def test_nothing_is_allocated_for_weights_of_another_shape(folder, load) -> None:
    """The headers are compared before the first tensor is made."""
    edit(folder, vocab_size=1 << 22, hidden_size=999_996)
    with pytest.raises(CheckpointError, match="the configuration expects"):
        load(folder)


def test_pickled_weights_are_refused_at_the_start_too(folder) -> None:
    (folder / SINGLE_NAME).rename(folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin is pickled, which is never read")


def test_an_orchestrator_needs_no_weights(folder) -> None:
    (folder / SINGLE_NAME).unlink()
    source = resolve_model(str(folder))
    assert read_identity(source, source.config()).model_fingerprint == ""


def test_files_are_closed_when_an_index_is_refused(folder) -> None:
    before = len(os.listdir("/proc/self/fd"))
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": SINGLE_NAME}}))
    for _ in range(3):
        with pytest.raises(CheckpointError, match="a is missing, which"):
            SafetensorsFolder(folder)
    assert len(os.listdir("/proc/self/fd")) <= before
