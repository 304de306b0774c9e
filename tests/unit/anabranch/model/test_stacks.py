"""A model's two stacks: each reads its own tensors."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch

from anabranch.errors import CheckpointError, ConfigError
from anabranch.kernels.plain import PlainKernels
from anabranch.model import load
from anabranch.model.attention_stack import AttentionStack
from anabranch.model.ffn_stack import FfnStack
from anabranch.model.loader import WeightLoader, stack_of
from anabranch.model.sources import ModelSource, resolve_model
from anabranch.model.weights import SafetensorsFolder, Slices, WeightSource
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

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


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


@pytest.mark.parametrize("recipe", ["llama-gqa-tied", "qwen2-moe-mixed", "qwen3-moe-sparse"])
def test_an_attention_stack_alone_reads_its_own_tensors_and_the_shared_experts(
    recipe: str, make_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_model(recipe)
    source = resolve_model(str(folder))
    watched: list[Watched] = []

    def opened(self: ModelSource) -> Watched:
        watched.append(Watched(SafetensorsFolder(self.path)))
        return watched[-1]

    config = source.config()
    monkeypatch.setattr(ModelSource, "weights", opened)
    # What is read for the digest is not counted.
    monkeypatch.setattr(load, "weights_digest", lambda weights: weights.read_names.clear() or "digest")
    with_digest, stack = load.load_attention_stack(
        source, dtype=torch.float32, device=CPU, kernels=PlainKernels(), group=SingleRank(), config=config
    )
    assert with_digest.weights_digest == "digest"
    names = set(watched[0].names())
    shared = {name for name in names if ".shared_expert" in name}
    assert watched[0].read_names == {name for name in names if stack_of(name) == "attention"} | shared
    sparse = [config.is_sparse(layer) and bool(shared) for layer in range(config.num_layers)]
    assert [expert is not None for expert in stack.shared_experts] == sparse


def test_workers_of_either_half_have_the_identity_of_whole_ones(make_model) -> None:
    folder, _ = make_model("qwen2-moe-mixed")
    where = {"dtype": torch.float32, "device": CPU, "group": SingleRank()}
    whole, _ = load.load_model(str(folder), kernels=PlainKernels(), **where)
    attention, _ = load.load_attention_stack(str(folder), kernels=PlainKernels(), **where)
    ffn, _ = load.load_expert_table(str(folder), products=PlainKernels(), **where)
    assert whole.weights_digest
    assert whole.fingerprint() == attention.fingerprint() == ffn.fingerprint()


class Place(SingleRank):
    """The first of some ranks, without its peers."""

    def __init__(self, size: int) -> None:
        self.size = size


def test_a_half_is_cut_no_further_than_its_own_widths_allow(make_model) -> None:
    # 6 query heads; 14 features of an expert, 22 of the shared one, 40 of the dense layer.
    folder, _ = make_model("qwen2-moe-mixed")
    where = {"dtype": torch.float32, "device": CPU}
    load.load_attention_stack(str(folder), kernels=PlainKernels(), group=Place(6), **where)
    load.load_expert_table(str(folder), products=PlainKernels(), group=Place(14), **where)
    with pytest.raises(ConfigError, match="tp: 7: must be at most the model's 6 query heads"):
        load.load_attention_stack(str(folder), kernels=PlainKernels(), group=Place(7), **where)
    with pytest.raises(ConfigError, match="tp: 15: must be at most the model's 14 FFN features"):
        load.load_expert_table(str(folder), products=PlainKernels(), group=Place(15), **where)
