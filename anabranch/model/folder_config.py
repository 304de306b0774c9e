"""Reads the configuration of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

from anabranch.errors import CheckpointError, ModelError
from anabranch.model.config import ModelConfig
from anabranch.model.context_length import check_original
from anabranch.model.families import model_config, supported_architecture

MAX_CONFIG_BYTES = 16 * 1024 * 1024


def read_folder_config(folder: Path) -> ModelConfig:
    """Configuration of a Hugging Face folder.

    Raises:
        CheckpointError: config.json is missing, malformed or contradicts itself.
        UnsupportedArchitecture: names the family or option.
    """
    raw = _read_json(folder / "config.json")
    architectures, model_type = raw.get("architectures"), raw.get("model_type")
    supported_architecture(
        architectures if isinstance(architectures, list) else None, model_type if isinstance(model_type, str) else None
    )
    # transformers divides by it before it checks it.
    for key in ("rope_parameters", "rope_scaling"):
        scaling = raw.get(key)
        if isinstance(scaling, dict):
            check_original(scaling)
    generation = folder / "generation_config.json"
    from transformers import AutoConfig

    try:
        hf = AutoConfig.from_pretrained(folder, local_files_only=True)
        if hf.architectures is None:
            hf.architectures = [supported_architecture(None, hf.model_type)]
        return model_config(hf, _read_json(generation) if generation.exists() else None)
    except ModelError:
        raise
    # transformers' validators raise whatever their authors chose; all of it means a bad configuration.
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'}: {type(error).__name__}: {error}") from error


def _read_json(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes; at most {MAX_CONFIG_BYTES} are read")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content
