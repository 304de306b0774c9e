"""`python -m tests.support.mixture DENSE FOLDER`: a dense Llama checkpoint as a Mixtral one that answers alike.

The features of each FFN are dealt to experts, all of which every token chooses: the router is zero, so that each has
the weight 1 / experts, and `down_proj` is scaled by their number. Both are powers of two, so nothing is rounded but the
order in which features are summed. A layer is read and written at a time.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from anabranch.model.sources import resolve_model
from anabranch.model.weights import INDEX_NAME, SafetensorsFolder

NUM_EXPERTS = 8
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Mixtral's names.
_PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def write_mixture(dense: Path, folder: Path, num_experts: int = NUM_EXPERTS) -> Path:
    """Write `folder`, with the tokenizer of `dense`; returns it.

    Args:
        dense: a folder of a Llama without biases.
        num_experts: a power of two that divides the FFN's features.

    Raises:
        ValueError: the model is another one, or cannot be dealt out so.
    """
    config = json.loads((dense / "config.json").read_text())
    if config["architectures"] != ["LlamaForCausalLM"] or config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(f"{dense}: {config['architectures']}: only a Llama without biases can be a Mixtral")
    if num_experts & (num_experts - 1) or config["intermediate_size"] % num_experts:
        raise ValueError(f"{num_experts} experts: must be a power of two that divides {config['intermediate_size']}")
    folder.mkdir(parents=True, exist_ok=True)
    for path in dense.iterdir():
        if path.name != "config.json" and ".safetensors" not in path.name:
            shutil.copy(path, folder)
    mixture = {
        **config,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": config["intermediate_size"] // num_experts,
        "num_local_experts": num_experts,
        "num_experts_per_tok": num_experts,
        "sliding_window": None,
    }
    (folder / "config.json").write_text(json.dumps(mixture, indent=2))
    with SafetensorsFolder(dense) as weights:
        file_of: dict[str, str] = {}
        for part, names in enumerate(_parts(weights)):
            tensors: dict[str, torch.Tensor] = {}
            for name in names:
                tensors.update(_mixed(name, weights.read(name), num_experts))
            file = f"model-{part:05}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
            file_of.update(dict.fromkeys(tensors, file))
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return folder


def _parts(weights: SafetensorsFolder) -> list[list[str]]:
    """Names of each layer's tensors, and of the others."""
    by_layer: dict[int, list[str]] = {}
    for name in sorted(weights.names()):
        found = _LAYER.match(name)
        by_layer.setdefault(int(found[1]) if found else -1, []).append(name)
    return [by_layer[layer] for layer in sorted(by_layer)]


def _mixed(name: str, tensor: torch.Tensor, num_experts: int) -> dict[str, torch.Tensor]:
    """What a tensor becomes; with a layer's gate comes its router."""
    prefix, found, projection = name.removesuffix(".weight").partition(".mlp.")
    if not found:
        return {name: tensor.clone()}
    moe = f"{prefix}.block_sparse_moe"
    down = projection == "down_proj"
    # A power of two: exact.
    slices = (tensor * num_experts).chunk(num_experts, dim=1) if down else tensor.chunk(num_experts, dim=0)
    named = {
        f"{moe}.experts.{expert}.{_PROJECTIONS[projection]}.weight": slice_.clone()
        for expert, slice_ in enumerate(slices)
    }
    if down:
        named[f"{moe}.gate.weight"] = tensor.new_zeros((num_experts, tensor.shape[0]))
    return named


if __name__ == "__main__":
    write_mixture(resolve_model(sys.argv[1]).path, Path(sys.argv[2]))
