"""A model's two stacks: each reads its own tensors, and experts that lie apart add up to the whole."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch

from anabranch.errors import CheckpointError
from anabranch.kernels.plain import PlainKernels
from anabranch.model.attention_stack import AttentionStack
from anabranch.model.ffn_half import FfnInput
from anabranch.model.ffn_stack import FfnStack
from anabranch.model.loader import WeightLoader, stack_of
from anabranch.model.sources import resolve_model
from anabranch.model.weights import Slices, WeightSource
from anabranch.parallel.group import SingleRank

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


class Watched:
    """A checkpoint that notes what is read, and holds a tensor that no model has."""

    def __init__(self, source: WeightSource, extra: str = "") -> None:
        self._source = source
        self._extra = extra
        self.read_names: set[str] = set()

    def names(self) -> Collection[str]:
        return [*self._source.names(), *([self._extra] if self._extra else [])]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str, slices: Slices = ()) -> torch.Tensor:
        self.read_names.add(name)
        return self._source.read(name, slices)

    def where(self, name: str) -> str:
        return "here"

    def close(self) -> None:
        self._source.close()


@pytest.mark.parametrize("recipe", ["llama-gqa-tied", "phi3-window", "mixtral", "qwen2-moe-mixed", "qwen3-moe-mixed"])
def test_each_stack_reads_its_own_tensors_and_both_read_all(recipe: str, make_model) -> None:
    folder, _ = make_model(recipe)
    config, weights = resolve_model(str(folder)).open()
    with weights:
        names = set(weights.names())
        attention, ffn = Watched(weights), Watched(weights)
        loader = WeightLoader(config, attention, torch.float32, CPU)
        AttentionStack(loader, PlainKernels(), SingleRank())
        loader.finish("attention")
        loader = WeightLoader(config, ffn, torch.float32, CPU)
        FfnStack(loader, PlainKernels(), SingleRank())
        loader.finish("ffn")
        assert not attention.read_names & ffn.read_names
        assert attention.read_names | ffn.read_names == names
        assert {stack_of(name) for name in ffn.read_names} == {"ffn"}


@pytest.mark.parametrize(
    ("extra", "stack"),
    [("model.layers.0.mlp.extra.weight", "ffn"), ("model.layers.0.self_attn.extra.weight", "attention")],
)
def test_a_tensor_without_a_place_is_refused_by_the_stack_that_it_belongs_to(
    extra: str, stack: str, make_model
) -> None:
    folder, _ = make_model("llama-gqa-tied")
    config, weights = resolve_model(str(folder)).open()
    with weights:
        loader = WeightLoader(config, Watched(weights, extra), torch.float32, CPU)
        AttentionStack(loader, PlainKernels(), SingleRank())
        FfnStack(loader, PlainKernels(), SingleRank())
        loader.finish("attention" if stack == "ffn" else "ffn")
        with pytest.raises(CheckpointError, match="has no place for it"):
            loader.finish("attention" if stack == "attention" else "ffn")


@pytest.mark.parametrize("recipe", ["mixtral", "qwen3-moe-mixed"])
def test_experts_that_lie_apart_add_up(recipe: str, make_model) -> None:
    folder, _ = make_model(recipe)
    config, weights = resolve_model(str(folder)).open()
    assert config.moe is not None
    num_experts, top_k = config.moe.num_experts, config.moe.top_k
    with weights:
        whole, first, second = (
            FfnStack(WeightLoader(config, weights, torch.float32, CPU), PlainKernels(), SingleRank(), experts)
            for experts in (None, [0, num_experts - 1], range(1, num_experts - 1))
        )
    generator = torch.Generator().manual_seed(0)
    layer = next(layer for layer in range(config.num_layers) if config.is_sparse(layer))
    rows = FfnInput(
        torch.randn(11, config.hidden_size, generator=generator),
        torch.rand(11, top_k, generator=generator),
        torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(11)]),
    )
    parts = first.layers[layer].forward(rows) + second.layers[layer].forward(rows)
    torch.testing.assert_close(parts, whole.layers[layer].forward(rows), rtol=1e-5, atol=1e-6)
