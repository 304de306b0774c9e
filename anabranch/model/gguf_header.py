"""A GGUF file's header, walked once with bounds: the readers after it believe every count and length they find."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from anabranch.errors import CheckpointError
from anabranch.model.config_bounds import MAX_EXPERTS
from anabranch.system.files import open_regular

MAX_TENSORS = 100_000
MAX_FIELDS = 10_000
MAX_NAME_BYTES = 1024
MAX_TEXT_BYTES = 1 << 20
# Of all arrays together: tokens, scores, types and merges of the largest vocabulary are 1.3 million.
MAX_ITEMS = 4_000_000
MAX_DIMENSIONS = 4
# Of all tensors together: the largest mixtures have under 100,000 matrices of experts.
MAX_EXPERT_MATRICES = 1_000_000
MAX_ALIGNMENT = 1 << 20

_VERSIONS = (2, 3)
_TEXT, _ARRAY = 8, 9
# GGUF's type of a metadata value -> its bytes.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_ALIGNMENT = b"general.alignment"
_DEFAULT_ALIGNMENT = 32


def check_gguf_header(path: Path) -> None:
    """Walk metadata and tensor table; reads no tensor data.

    Raises:
        CheckpointError: no regular file, not a GGUF file, cut short, or with counts, lengths or dimensions that no
            model has; names the field or tensor.
    """
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(path, data).run()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, struct.error) as error:  # an empty file cannot be mapped; a read past the end
        raise CheckpointError(f"{path}: not a whole GGUF file: {error}; fetch it again") from error


class _Walk:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._offset = 0
        self._num_items = 0
        self._num_experts = 0
        self._alignment = _DEFAULT_ALIGNMENT

    def run(self) -> None:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not start with GGUF")
        self._skip(4)
        version = self._number("<I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is none of {', '.join(map(str, _VERSIONS))}")
        num_tensors = self._bounded(self._number("<Q"), MAX_TENSORS, "tensors")
        num_fields = self._bounded(self._number("<Q"), MAX_FIELDS, "metadata fields")
        for _ in range(num_fields):
            self._field()
        ends = [self._tensor() for _ in range(num_tensors)]
        start = -(-self._offset // self._alignment) * self._alignment
        for name, end in ends:
            if start + end > self._size:
                raise ValueError(f"tensor {name} ends at byte {start + end:,} of {self._size:,}")

    def _field(self) -> None:
        key = self._text(MAX_NAME_BYTES, "a metadata key")
        name = key.decode(errors="replace")
        kind = self._number("<I")
        if key == _ALIGNMENT and kind == 4:
            self._alignment = self._number("<I")
            if not 0 < self._alignment <= MAX_ALIGNMENT or self._alignment & (self._alignment - 1):
                raise self._refused(f"{name} is {self._alignment}; it must be a power of two up to {MAX_ALIGNMENT:,}")
        elif kind == _ARRAY:
            self._array(name)
        elif kind == _TEXT:
            self._text(MAX_TEXT_BYTES, name)
        else:
            self._skip(self._width(name, kind))

    def _array(self, name: str) -> None:
        kind, count = self._number("<I"), self._number("<Q")
        self._num_items += count
        self._bounded(self._num_items, MAX_ITEMS, f"array items up to {name}")
        if kind == _TEXT:
            for _ in range(count):
                self._text(MAX_TEXT_BYTES, name)
        else:
            self._skip(count * self._width(name, kind))

    def _tensor(self) -> tuple[str, int]:
        """The tensor's name, and its end in bytes from the start of all tensors."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._text(MAX_NAME_BYTES, "a tensor's name").decode(errors="replace")
        num_dimensions = self._bounded(self._number("<I"), MAX_DIMENSIONS, f"dimensions of {name}")
        shape = [self._number("<Q") for _ in range(num_dimensions)]
        if not all(shape):
            raise self._refused(f"tensor {name} has shape {shape[::-1]}; every dimension must be at least 1")
        for experts in shape[2:]:
            self._bounded(experts, MAX_EXPERTS, f"experts of {name}")
            self._num_experts += experts
            self._bounded(self._num_experts, MAX_EXPERT_MATRICES, f"experts' matrices up to {name}")
        kind, offset = self._number("<I"), self._number("<Q")
        try:
            block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise self._refused(f"tensor {name} has the unknown type {kind}") from None
        if shape and shape[0] % block_size:
            raise self._refused(f"tensor {name} has rows of {shape[0]}, no multiple of its blocks of {block_size}")
        return name, offset + math.prod(shape) // block_size * block_bytes

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self._data, self._offset)
        self._offset += struct.calcsize(form)
        return int(value)

    def _text(self, max_bytes: int, what: str) -> bytes:
        (length,) = struct.unpack_from("<Q", self._data, self._offset)
        if length > max_bytes:
            self._bounded(length, max_bytes, f"bytes of {what}")
        start = self._offset + 8
        self._skip(8 + length)
        return self._data[start : self._offset]

    def _skip(self, num_bytes: int) -> None:
        self._offset += num_bytes
        if self._offset > self._size:
            raise ValueError(f"its header goes on after its end at byte {self._size:,}")

    def _width(self, name: str, kind: int) -> int:
        if kind not in _WIDTHS:
            raise self._refused(f"{name} holds values of type {kind}, which cannot be read")
        return _WIDTHS[kind]

    def _bounded(self, count: int, most: int, what: str) -> int:
        if count > most:
            raise self._refused(f"{count:,} {what}; at most {most:,} are read")
        return count

    def _refused(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {what}")
