"""Where weights are read from: named tensors, of which a rank reads only the slices that it holds."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError, safe_open

from anabranch.errors import CheckpointError

if TYPE_CHECKING:
    from types import TracebackType

Slices = tuple[slice, ...]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
FLOAT_LABELS = ("F64", "F32", "F16", "BF16")
# Pages of a mapped file count as the process's memory until it is unmapped, so a long read maps afresh.
MAX_MAPPED_BYTES = 64 * 1024 * 1024


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
        try:
            self.handle = self._stack.enter_context(safe_open(self.path, framework="pt", device="cpu"))
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: the file is missing") from None
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
            for name, file in _read_index(index).items():
                self._file_of[name] = file
            for file in sorted(set(self._file_of.values())):
                held = set(self._shard(file).handle.keys())
                for name in (name for name, of in self._file_of.items() if of == file):
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


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        entries = dict(weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index with a weight_map: {error!r}") from error
    for name, file in entries.items():
        # A shard lies beside its index; a path that leads elsewhere is not followed.
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path}: {name} points to {file!r}, which is no file name")
    return entries
