"""Shared experts that FFN workers hold: the same answers as from attention's own, placed and counted as layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anabranch.errors import ConfigError
from anabranch.kernels.combine import combine_slots
from anabranch.kernels.plain import PlainKernels
from anabranch.model.load import load_attention_stack, load_expert_table
from anabranch.model.shared_layers import ffn_layers, with_shared
from anabranch.model.size import attention_bytes
from anabranch.parallel.expert_placement import place
from anabranch.parallel.group import SingleRank
from tests.support.families import build

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse, dense, sparse; 6 experts, 3 chosen, and a shared one."""
    folder = tmp_path_factory.mktemp("qwen2-moe-mixed")
    build("qwen2-moe-mixed").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_those_of_attentions_own(folder: Path, dtype: torch.dtype) -> None:
    kernels, group = PlainKernels(), SingleRank()
    config, own = load_attention_stack(
        str(folder), dtype=dtype, device=CPU, kernels=kernels, group=group, shared_expert="attn"
    )
    _, gated = load_attention_stack(
        str(folder), dtype=dtype, device=CPU, kernels=kernels, group=group, shared_expert="ffn"
    )
    _, table = load_expert_table(str(folder), dtype=dtype, device=CPU, products=kernels, group=group, shared=True)
    with table.reading() as loader:
        for layer in range(config.num_layers):
            table.load(loader, layer, range(table.num_experts(layer)))
    rows_TC = torch.randn((16, config.hidden_size), generator=torch.Generator().manual_seed(1)).to(dtype)
    assert [shared is not None for shared in own.shared_experts] == [True, False, True]
    assert gated.shared_experts == [None, None, None]
    for layer in (0, 2):
        answers = []
        for stack in (own, gated):
            normed_TC, weights_TS, experts_TS, shared = stack.layers[layer].choose(rows_TC)
            assert weights_TS is not None
            assert experts_TS is not None
            num_choices = experts_TS.shape[1]
            rows_A = torch.arange(16).repeat_interleave(num_choices)
            slots_AC = table.compute_slots(layer, normed_TC, rows_A, experts_TS.flatten())
            answers_TC = combine_slots(slots_AC.view(16, num_choices, -1), weights_TS, shared=shared)
            beside = stack.shared_experts[layer]
            answers.append(answers_TC if beside is None else answers_TC + beside.forward(rows_TC))
        assert torch.equal(*answers), layer


def test_they_are_placed_as_layers_of_their_own(folder: Path) -> None:
    config, table = load_expert_table(
        str(folder), dtype=torch.float32, device=CPU, products=PlainKernels(), group=SingleRank(), shared=True
    )
    layers = ffn_layers(config, "float32", shared=True)
    assert layers == table.layers
    assert [count for count, _ in layers] == [6, 1, 6, 1, 1]
    assert layers[:3] == ffn_layers(config, "float32", shared=False)
    placement = place(layers, {"a": 0, "b": 0}, replicas=1)
    folded = {name: with_shared(config, holding) for name, holding in placement.items()}
    with table.reading() as loader:
        for holding in folded.values():
            for layer, experts in enumerate(holding):
                table.load(loader, layer, experts)
    # Each once, and as many bytes as were counted.
    assert table.holding() == (tuple(range(7)), (0,), tuple(range(7)))
    assert table.num_bytes == sum(count * num_bytes for count, num_bytes in layers)


def test_attention_has_their_gates_alone(folder: Path) -> None:
    config, own = load_attention_stack(
        str(folder), dtype=torch.float32, device=CPU, kernels=PlainKernels(), group=SingleRank(), shared_expert="ffn"
    )
    gates = sum(half.gate.shared.weight_1C.nbytes for half in own.layers if half.gate and half.gate.shared)
    assert gates == 2 * 4 * config.hidden_size
    without = attention_bytes(config, "float32", 1, 0)
    assert attention_bytes(config, "float32", 1, 0, shared_gates=True) == without + gates


def test_more_ranks_than_a_shared_expert_has_features(folder: Path) -> None:
    class Many(SingleRank):
        size = 23

    with pytest.raises(ConfigError, match="tp"):
        load_expert_table(
            str(folder), dtype=torch.float32, device=CPU, products=PlainKernels(), group=Many(), shared=True
        )
