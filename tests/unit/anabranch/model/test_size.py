"""The bytes that are counted before loading are those that are then held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anabranch.kernels.plain import PlainKernels
from anabranch.model.load import load_model
from anabranch.model.size import attention_bytes, ffn_bytes, weight_bytes
from anabranch.model.sources import resolve_model
from anabranch.parallel.group import SingleRank
from tests.support.families import RECIPES, build

pytestmark = pytest.mark.unit


class Place(SingleRank):
    """A rank's place, without its peers: loading speaks to nobody."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def held_bytes(root: object) -> int:
    """Bytes of all tensors that can be reached, those of shared memory once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    todo = [root]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, list):
            todo.extend(value)
        elif type(value).__module__.startswith("anabranch.model"):
            todo.extend(getattr(value, "__dict__", {}).values())
    return sum(storages.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_counted_bytes_are_held_bytes(recipe: str, tmp_path: Path) -> None:
    build(recipe).save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    config = source.config()
    for tp in range(1, min(config.num_heads, 4) + 1):
        held = []
        for rank in range(tp):
            _, model = load_model(
                source,
                dtype=torch.bfloat16,
                device=torch.device("cpu"),
                kernels=PlainKernels(),
                group=Place(rank, tp),
                config=config,
            )
            assert attention_bytes(config, "bfloat16", tp, rank) == held_bytes(model.attention)
            assert ffn_bytes(config, "bfloat16", tp, rank) == held_bytes(model.ffn)
            held.append(held_bytes(model))
        assert weight_bytes(config, "bfloat16", tp) == max(held), tp
