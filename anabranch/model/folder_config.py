"""Reads the configuration of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from anabranch.errors import CheckpointError, ModelError, UnsupportedArchitecture
from anabranch.model.config import ModelConfig
from anabranch.model.config_bounds import check_token_ids, checked_fields
from anabranch.model.context_length import check_original
from anabranch.model.families import model_config, supported_architecture
from anabranch.model.json_files import read_json_object


def read_folder_config(folder: Path) -> ModelConfig:
    """Configuration of a Hugging Face folder.

    transformers is given the fields that Anabranch goes by, each checked, and opens no file itself: no code of the
    folder's, and no number that nobody has looked at, reaches it.

    Raises:
        CheckpointError: config.json is missing, malformed, out of bounds or contradicts itself.
        UnsupportedArchitecture: names the family or option.
    """
    path = folder / "config.json"
    raw = read_json_object(path)
    # A family that is not supported is told so, whatever else its configuration holds.
    kind = checked_fields(str(path), {key: raw[key] for key in ("architectures", "model_type") if key in raw})
    architectures, model_type = kind.get("architectures"), kind.get("model_type")
    architecture = supported_architecture(
        architectures if isinstance(architectures, list) else None, model_type if isinstance(model_type, str) else None
    )
    # transformers divides by it before it checks it.
    for key in ("rope_parameters", "rope_scaling"):
        scaling = raw.get(key)
        if isinstance(scaling, dict):
            check_original(scaling)
    fields = checked_fields(str(path), raw)
    if model_type == "mistral" and "layer_types" in raw:
        raise UnsupportedArchitecture(f"{path}: layer_types: not supported with model type 'mistral'")
    generation = _read_generation(folder / "generation_config.json")
    from transformers import CONFIG_MAPPING

    try:
        hf = CONFIG_MAPPING[model_type].from_dict({**fields, "architectures": architectures or [architecture]})
        return model_config(hf, generation)
    except ModelError:
        raise
    # transformers' validators raise whatever their authors chose; all of it means a bad configuration.
    except Exception as error:
        raise CheckpointError(f"{path}: {type(error).__name__}: {error}") from error


def _read_generation(path: Path) -> dict[str, object] | None:
    if not path.exists():
        return None
    generation = read_json_object(path)
    for key in ("bos_token_id", "eos_token_id"):
        check_token_ids(str(path), key, generation.get(key))
    return generation
