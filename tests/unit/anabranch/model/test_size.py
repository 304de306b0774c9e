"""The bytes that are counted before loading are those that are then held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anabranch.kernels.plain import PlainKernels
from anabranch.model.load import load_attention_stack, load_expert_table, load_model
from anabranch.model.size import attention_bytes, expert_bytes, ffn_bytes, num_experts, weight_bytes
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


@pytest.mark.parametrize("recipe", RECIPES)
def test_counted_bytes_of_halves_apart_are_held_bytes(recipe: str, tmp_path: Path) -> None:
    build(recipe).save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    where = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "config": source.config()}
    for tp in (1, 3):
        tables = []
        for rank in range(tp):
            config, attention = load_attention_stack(source, kernels=PlainKernels(), group=Place(rank, tp), **where)
            counted = attention_bytes(config, "bfloat16", tp, rank, shared_experts=True)
            assert counted == held_bytes(attention)
            _, table = load_expert_table(source, products=PlainKernels(), group=Place(rank, tp), **where)
            tables.append(table)
        for layer in range(config.num_layers):
            before = sum(table.num_bytes for table in tables)
            for table in tables:
                with table.reading() as loader:
                    table.load(loader, layer, (0,))
            loaded = sum(table.num_bytes for table in tables) - before
            bias = config.hidden_size * 2 * (tp - 1) * (config.mlp_bias and not config.is_sparse(layer))
            assert expert_bytes(config, "bfloat16", layer) <= loaded <= expert_bytes(config, "bfloat16", layer) + bias
        whole = sum(num_experts(config, layer) for layer in range(config.num_layers))
        sparse = 0 if config.moe is None else sum(config.moe.sparse_layers) * config.moe.num_experts
        assert whole == sparse + sum(not config.is_sparse(layer) for layer in range(config.num_layers))
