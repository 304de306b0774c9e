"""What a model's name stands for: a known name, a Hugging Face folder or a GGUF file. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from anabranch.errors import CheckpointError, UnknownModel
from anabranch.model.known import KNOWN_MODELS

if TYPE_CHECKING:
    from anabranch.model.config import ModelConfig
    from anabranch.model.gguf_weights import GgufFile
    from anabranch.model.weights import SafetensorsFolder

SourceKind = Literal["folder", "gguf"]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model on this machine.

    Attributes:
        name: what the user called it.
        path: Hugging Face folder or GGUF file.
    """

    name: str
    path: Path
    kind: SourceKind

    def open(self) -> tuple[ModelConfig, SafetensorsFolder | GgufFile]:
        """The model's configuration, without its weights' digest, and its tensors; the caller closes these.

        Raises:
            ModelError: not supported, or broken.
        """
        from anabranch.model.folder_config import read_folder_config
        from anabranch.model.gguf_config import read_gguf_config
        from anabranch.model.gguf_weights import GgufFile
        from anabranch.model.tied_head import with_stored_head
        from anabranch.model.weights import SafetensorsFolder

        if self.kind == "folder":
            config, weights = read_folder_config(self.path), SafetensorsFolder(self.path)
            try:
                return with_stored_head(config, weights), weights
            except BaseException:
                weights.close()
                raise
        file = GgufFile(self.path)
        try:
            return read_gguf_config(file), file
        except BaseException:
            file.close()
            raise

    def weights(self) -> SafetensorsFolder | GgufFile:
        """The model's tensors alone; the caller closes them. Raises CheckpointError."""
        from anabranch.model.gguf_weights import GgufFile
        from anabranch.model.weights import SafetensorsFolder

        return SafetensorsFolder(self.path) if self.kind == "folder" else GgufFile(self.path)

    def has_weights(self) -> bool:
        """Whether files of weights are here, be they whole or broken."""
        if self.kind == "gguf":
            return True
        return any(next(self.path.glob(kind), None) for kind in ("*.safetensors", "pytorch_model*.bin"))

    def config(self) -> ModelConfig:
        """The model's configuration alone, without its weights' digest.

        Raises:
            ModelError: not supported, or broken.
        """
        from anabranch.model.folder_config import read_folder_config
        from anabranch.model.tied_head import with_stored_head
        from anabranch.model.weights import SafetensorsFolder

        if self.kind == "gguf":
            config, file = self.open()
            file.close()
            return config
        config = read_folder_config(self.path)
        if not config.tie_embeddings:
            return config
        try:
            with SafetensorsFolder(self.path) as weights:
                return with_stored_head(config, weights)
        except CheckpointError:
            # There may be none here, as beside an orchestrator alone; what is broken, whoever loads it will name.
            return config


def resolve_model(name: str) -> ModelSource:
    """Find a model by known name or path; a known one is converted at its first use.

    Raises:
        UnknownModel: there is none, saying which names are known; or its package is not installed, saying how.
        CheckpointError: the path holds no model.
    """
    if name in KNOWN_MODELS:
        return ModelSource(name=name, path=KNOWN_MODELS[name].folder(), kind="folder")
    path = _existing(name)
    if path is None:
        raise UnknownModel(
            f"{name!r} is no model known here ({', '.join(KNOWN_MODELS)}), "
            "and no folder or GGUF file of that name exists"
        )
    if path.is_dir():
        if not (path / "config.json").exists():
            raise CheckpointError(f"{path}: no config.json is in this folder")
        return ModelSource(name=name, path=path, kind="folder")
    if path.suffix.lower() == ".gguf":
        return ModelSource(name=name, path=path, kind="gguf")
    raise UnknownModel(f"{path}: neither a Hugging Face folder nor a .gguf file")


def _existing(name: str) -> Path | None:
    if not name.strip():
        return None
    try:
        path = Path(name).expanduser().resolve()
        return path if path.exists() else None
    # A home that does not exist, a name too long for the file system, a zero byte.
    except (OSError, RuntimeError, ValueError):
        return None
