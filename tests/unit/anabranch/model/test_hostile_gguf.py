"""GGUF files whose header promises what the file does not hold, or more than any model has: refused by name."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from gguf import GGUFWriter

from anabranch.errors import CheckpointError
from anabranch.model.gguf_header import check_gguf_header
from anabranch.model.sources import resolve_model
from anabranch.model.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

UINT32, TEXT, ARRAY = 4, 8, 9
HUGE = 1 << 60


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def field(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(*parts: bytes, fields: int = 0, tensors: int = 0, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts)


BAD = {
    "nothing": (b"", "not a whole GGUF file"),
    "another magic": (header(magic=b"GGML"), "not a whole GGUF file: it does not start with GGUF"),
    "another version": (header(version=99), "version 99 is none of 2, 3"),
    "big endian": (header(version=3 << 24), "version 50331648 is none of"),
    "tensors": (header(tensors=HUGE), "1,152,921,504,606,846,976 tensors; at most 100,000"),
    "fields": (header(fields=HUGE), "metadata fields; at most 10,000"),
    "fields that end early": (header(fields=9), "not a whole GGUF file"),
    "a key's length": (header(text(b"a", HUGE), fields=1), "bytes of a metadata key; at most 1,024"),
    "a key past the end": (header(text(b"a", 900), fields=1), "goes on after its end"),
    "a text's length": (header(field(b"k", TEXT, text(b"a", HUGE)), fields=1), "bytes of k; at most 1,048,576"),
    "an array's length": (
        header(field(b"k", ARRAY, struct.pack("<IQ", UINT32, HUGE)), fields=1),
        "array items up to k; at most 4,000,000",
    ),
    "two arrays' length": (
        header(*(field(b"k", ARRAY, struct.pack("<IQ", 0, 3_000_000) + bytes(3_000_000)) for _ in "ab"), fields=2),
        "6,000,000 array items up to k",
    ),
    "an array past the end": (
        header(field(b"k", ARRAY, struct.pack("<IQ", UINT32, 1_000_000)), fields=1),
        "goes on after its end",
    ),
    "texts past the end": (
        header(field(b"k", ARRAY, struct.pack("<IQ", TEXT, 1_000_000) + text(b"a")), fields=1),
        "not a whole GGUF file",
    ),
    "nested arrays": (
        header(field(b"k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 1000), fields=1),
        "k holds values of type 9, which cannot be read",
    ),
    "an unknown type": (header(field(b"k", 77, b"1234"), fields=1), "k holds values of type 77"),
    "the alignment": (
        header(field(b"general.alignment", UINT32, struct.pack("<I", 3)), fields=1),
        "general.alignment is 3; it must be a power of two",
    ),
    "dimensions": (header(tensor(b"t", (1,) * 9), tensors=1), "9 dimensions of t; at most 4"),
    "a dimension of 0": (header(tensor(b"t", (4, 0)), tensors=1), r"tensor t has shape \[0, 4\]"),
    "experts": (header(tensor(b"t", (1, 1, 10**12)), tensors=1), "experts of t; at most 8,192"),
    "experts of all tensors": (
        header(*(tensor(b"t", (1, 1, 8000)) for _ in range(200)), tensors=200),
        "1,008,000 experts' matrices up to t; at most 1,000,000",
    ),
    "a tensor past the end": (header(tensor(b"t", (1 << 31, 1 << 31)), tensors=1), "tensor t ends at byte"),
    "an offset past the end": (header(tensor(b"t", (4,), offset=HUGE), tensors=1), "tensor t ends at byte"),
    "a quantisation": (header(tensor(b"t", (4,), kind=250), tensors=1), "tensor t has the unknown type 250"),
    "rows of no blocks": (
        header(tensor(b"t", (33,), kind=2), tensors=1),
        "rows of 33, no multiple of its blocks of 32",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_header_promises(tmp_path: Path, case: str) -> None:
    data, message = BAD[case]
    path = tmp_path / "it.gguf"
    path.write_bytes(data)
    source = resolve_model(str(path))
    for read in (source.config, source.weights, lambda: Tokenizer(source), lambda: check_gguf_header(path)):
        with pytest.raises(CheckpointError, match=message):
            read()


@pytest.mark.parametrize("kind", ["FIFO", "device"])
def test_what_is_no_regular_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it.gguf"
    if kind == "FIFO":
        os.mkfifo(path)
        source = resolve_model(str(path))
        with pytest.raises(CheckpointError, match="it is a FIFO, not a regular file"):
            source.config()
    else:
        path.symlink_to("/dev/zero")
        with pytest.raises(CheckpointError, match="it is a device, not a regular file"):
            check_gguf_header(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", 10**9, r"llama\.block_count is 1000000000; it must be a whole number from 1 to 1,024"),
        ("attention.head_count", 10**6, r"llama\.attention\.head_count is 1000000"),
        ("embedding_length", (1 << 32) - 1, r"llama\.embedding_length is 4294967295"),
        ("attention.head_count_kv", 10**6, "num_key_value_heads is 1000000"),
        ("attention.key_length", 10**6, "head_dim is 1000000"),
        ("expert_count", 10**6, r"llama\.expert_count is 1000000"),
    ],
)
def test_metadata_out_of_bounds(tmp_path: Path, key: str, value: int, message: str) -> None:
    import numpy as np

    writer = GGUFWriter(tmp_path / "it.gguf", "llama")
    sizes = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 8,
        "feed_forward_length": 8,
        "attention.head_count": 2,
        "expert_used_count": 1,
    }
    for name, number in {**sizes, key: value}.items():
        writer.add_uint32(f"llama.{name}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=message):
        resolve_model(str(tmp_path / "it.gguf")).config()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_an_epsilon_that_is_none(tmp_path: Path, value: float) -> None:
    import numpy as np

    writer = GGUFWriter(tmp_path / "it.gguf", "llama")
    for name in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{name}", 8)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"layer_norm_rms_epsilon is .*; it must be a number above 0"):
        resolve_model(str(tmp_path / "it.gguf")).config()
