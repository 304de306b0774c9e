"""Where weights are read from: named tensors, of which a rank reads only the slices that it holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError, safe_open

from anabranch.errors import CheckpointError
from anabranch.model.json_files import read_json_object
from anabranch.system.files import open_regular

if TYPE_CHECKING:
    from types import TracebackType

Slices = tuple[slice, ...]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
FLOAT_LABELS = ("F64", "F32", "F16", "BF16")
# Pages of a mapped file count as the process's memory until it is unmapped, so a long read maps afresh.
MAX_MAPPED_BYTES = 64 * 1024 * 1024
# The largest checkpoints name some 200,000 tensors, in an index of 20 MB; one file's header holds a part of them.
MAX_INDEX_BYTES = 64 << 20
MAX_INDEX_VALUES = 1_000_000
MAX_HEADER_BYTES = 32 << 20


class WeightSource(Protocol):
    """A checkpoint's tensors under their Hugging Face names."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, slices: Slices = ()) -> torch.Tensor:
        """The tensor's part that `slices` (one for each leading axis) name, in a floating dtype on the CPU.

        It may be a view of the file: copy it, and let go of it before the next read.

        Raises:
            CheckpointError: the tensor is missing or cannot be read.
        """
        ...

    def where(self, name: str) -> str:
        """The file that holds (or should hold) the tensor, for messages."""
        ...

    def close(self) -> None: ...


class _Shard:
    """One safetensors file, opened when first needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mapped_bytes = 0
        self._stack = ExitStack()
        self._open()

    def _open(self) -> None:
        _check_header(self.path)
        try:
            self.handle = self._stack.enter_context(safe_open(self.path, framework="pt", device="cpu"))
        except (OSError, SafetensorError) as error:
            size = self.path.stat().st_size if self.path.exists() else 0
            raise CheckpointError(
                f"{self.path}: not a whole safetensors file ({size} bytes): {error}; fetch it again"
            ) from error

    def read(self, name: str, slices: Slices) -> torch.Tensor:
        if self.mapped_bytes > MAX_MAPPED_BYTES:
            self.close()
            self._open()
        view = self.handle.get_slice(name)
        label = view.get_dtype()
        if label not in FLOAT_LABELS:
            raise CheckpointError(f"{self.path}: {name} has dtype {label}, expected one of {', '.join(FLOAT_LABELS)}")
        tensor: torch.Tensor = view[slices or slice(None)] if view.get_shape() else self.handle.get_tensor(name)
        self.mapped_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def close(self) -> None:
        self._stack.close()
        self.mapped_bytes = 0


class SafetensorsFolder:
    """A folder with `model.safetensors`, or with several shards and their index.

    Raises:
        CheckpointError: files are missing, cut short, or contradict the index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX_NAME
        self._shards: dict[str, _Shard] = {}
        self._file_of: dict[str, str] = {}
        if index.exists():
            self._file_of = _read_index(index)
            names_of: dict[str, list[str]] = defaultdict(list)
            for name, file in self._file_of.items():
                names_of[file].append(name)
            for file, names in sorted(names_of.items()):
                held = set(self._shard(file).handle.keys())
                for name in names:
                    if name not in held:
                        raise CheckpointError(f"{folder / file}: {name} is missing, which {INDEX_NAME} puts there")
        elif (folder / SINGLE_NAME).exists():
            self._file_of = dict.fromkeys(self._shard(SINGLE_NAME).handle.keys(), SINGLE_NAME)
        else:
            pickled = next(iter(sorted(folder.glob("*.bin"))), None)
            remedy = f"; {pickled.name} is pickled, which is never read: save it as safetensors" if pickled else ""
            raise CheckpointError(f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME} is here{remedy}")

    def _shard(self, file: str) -> _Shard:
        if file not in self._shards:
            self._shards[file] = _Shard(self.folder / file)
        return self._shards[file]

    def names(self) -> Collection[str]:
        return self._file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._held(name).handle.get_slice(name).get_shape())

    def read(self, name: str, slices: Slices = ()) -> torch.Tensor:
        return self._held(name).read(name, slices)

    def where(self, name: str) -> str:
        return str(self.folder / self._file_of.get(name, ""))

    def _held(self, name: str) -> _Shard:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return self._shard(self._file_of[name])

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()
        self._shards.clear()

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_header(path: Path) -> None:
    """Only a regular file, whose header's length (the file's own word) is bounded, is handed to safetensors."""
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: not a whole safetensors file: its header would have {length:,} bytes, "
            f"and at most {MAX_HEADER_BYTES:,} are read; fetch it again"
        )


def _read_index(path: Path) -> dict[str, str]:
    content = read_json_object(path, max_bytes=MAX_INDEX_BYTES, max_values=MAX_INDEX_VALUES)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: not an index with a weight_map")
    entries: dict[str, str] = {}
    for name, file in weight_map.items():
        # A shard lies beside its index; a path that leads elsewhere is not followed. A link under the name is: so
        # the caches of Hugging Face look.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {name} points to {file!r}, which is no file name ending in .safetensors")
        entries[name] = file
    return entries
