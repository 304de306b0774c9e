"""Experts that come and go: each is read alone, and what they answer adds up to what the whole layer answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anabranch.errors import CheckpointError
from anabranch.kernels.base import Kernels
from anabranch.kernels.combine import combine_slots, sum_assignments
from anabranch.kernels.native import select_kernels
from anabranch.kernels.plain import PlainKernels
from anabranch.model.expert_table import ExpertTable
from anabranch.model.ffn_half import FfnInput
from anabranch.model.load import load_attention_stack, load_expert_table, load_model
from anabranch.parallel.group import Group, SingleRank
from anabranch.parallel.threads import run_ranks

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
WHERE = {"dtype": torch.float32, "device": CPU}


def make_table(folder: Path, kernels: Kernels | None = None, group: Group | None = None) -> ExpertTable:
    _, table = load_expert_table(str(folder), products=kernels or PlainKernels(), group=group or SingleRank(), **WHERE)
    return table


def load(table: ExpertTable, layer: int, experts: list[int] | range) -> ExpertTable:
    with table.reading() as loader:
        table.load(loader, layer, experts)
    return table


def draw(table: ExpertTable, num_rows: int) -> FfnInput:
    moe = table.config.moe
    assert moe is not None
    generator = torch.Generator().manual_seed(num_rows)
    return FfnInput(
        torch.randn(num_rows, table.config.hidden_size, generator=generator),
        torch.rand(num_rows, moe.top_k, generator=generator),
        torch.stack([torch.randperm(moe.num_experts, generator=generator)[: moe.top_k] for _ in range(num_rows)]),
    )


def slots(table: ExpertTable, layer: int, rows: FfnInput) -> torch.Tensor:
    """`[T, S, C]`."""
    assert rows.experts_TS is not None
    num_rows, top_k = rows.experts_TS.shape
    rows_A = torch.arange(num_rows, dtype=torch.int32).repeat_interleave(top_k)
    answers_AC = table.compute_slots(layer, rows.normed_TC, rows_A, rows.experts_TS.flatten().int())
    return answers_AC.view(num_rows, top_k, -1)


@pytest.mark.parametrize("recipe", ["mixtral", "qwen2-moe-mixed", "qwen3-moe-mixed", "qwen2-moe-norm-window"])
@pytest.mark.parametrize("num_rows", [1, 3, 23])
def test_slots_and_shared_expert_combine_to_the_bits_of_the_whole_layer(recipe: str, num_rows: int, make_model) -> None:
    folder, _ = make_model(recipe)
    kernels = select_kernels(CPU, torch.float32)
    if kernels.name != "native":
        pytest.skip("no compiled kernels here")
    _, whole = load_model(str(folder), kernels=kernels, group=SingleRank(), **WHERE)
    config, attention = load_attention_stack(str(folder), kernels=kernels, group=SingleRank(), **WHERE)
    table = make_table(folder, kernels)
    for layer in range(config.num_layers):
        if not config.is_sparse(layer):
            load(table, layer, [0])
            rows_TC = torch.randn(num_rows, config.hidden_size)
            expected = whole.ffn.layers[layer].forward(FfnInput(rows_TC, None, None))
            assert torch.equal(table.compute_rows(layer, rows_TC), expected)
            continue
        load(table, layer, range(config.moe.num_experts))
        rows = draw(table, num_rows)
        answer_TC = combine_slots(slots(table, layer, rows), rows.weights_TS)
        shared = attention.shared_experts[layer]
        if shared is not None:
            answer_TC = answer_TC + shared.forward(rows.normed_TC)
        assert torch.equal(answer_TC, whole.ffn.layers[layer].forward(rows))


@pytest.mark.parametrize("recipe", ["mixtral", "qwen3-moe-mixed"])
def test_experts_that_lie_apart_add_up(recipe: str, make_model) -> None:
    folder, _ = make_model(recipe)
    _, whole = load_model(str(folder), kernels=PlainKernels(), group=SingleRank(), **WHERE)
    config = whole.attention.config
    layer = next(layer for layer in range(config.num_layers) if config.is_sparse(layer))
    last = config.moe.num_experts - 1
    parts = [[0, last], list(range(1, last))]
    rows = draw(make_table(folder), 11)
    total_TC = torch.zeros(11, config.hidden_size)
    for held in parts:
        table = load(make_table(folder), layer, held)
        chosen = [
            (row, slot)
            for row, slot in torch.cartesian_prod(torch.arange(11), torch.arange(config.moe.top_k))
            if int(rows.experts_TS[row, slot]) in held
        ]
        rows_A = torch.tensor([int(row) for row, _ in chosen], dtype=torch.int32)
        experts_A = torch.tensor([int(rows.experts_TS[place]) for place in chosen], dtype=torch.int32)
        weights_A = torch.tensor([float(rows.weights_TS[place]) for place in chosen])
        answers_AC = table.compute_slots(layer, rows.normed_TC, rows_A, experts_A)
        total_TC += sum_assignments(answers_AC, weights_A, rows_A, 11)
    torch.testing.assert_close(total_TC, whole.ffn.layers[layer].forward(rows), rtol=1e-5, atol=1e-6)


def test_sums_go_in_the_order_of_the_assignments() -> None:
    # In float32, 1e8 + 1 - 1e8 is 0 and 1e8 - 1e8 + 1 is 1.
    answers_AC = torch.tensor([[1e8], [1e8], [1.0], [-1e8], [-1e8], [1.0]])
    rows_A = torch.tensor([0, 1, 0, 1, 0, 1], dtype=torch.int32)
    sums = sum_assignments(answers_AC, torch.ones(6), rows_A, 3)
    assert sums.tolist() == [[0.0], [1.0], [0.0]]


def test_only_what_is_missing_is_read_and_what_is_dropped_is_gone(make_model) -> None:
    folder, _ = make_model("qwen2-moe-mixed")
    table = make_table(folder)
    assert table.holding() == ((), (), ())
    assert table.num_bytes == 0
    load(table, 0, [4, 1])
    load(table, 1, [0])
    assert table.holding() == ((1, 4), (0,), ())
    first = table._experts[0][1]
    load(table, 0, [1, 2])
    assert table._experts[0][1] is first
    assert table.holds(0, [1, 2, 4]) and not table.holds(0, [1, 3])
    assert table.holds(1, [0]) and not table.holds(2, [0])
    table.drop(0, [1, 4, 5])
    table.drop(1, [0])
    table.drop(2, [0])
    assert table.holding() == ((2,), (), ())
    assert table.num_bytes == 4 * 3 * 14 * 48
    rows = draw(table, 2)
    with pytest.raises(KeyError):
        table.compute_slots(0, rows.normed_TC, torch.tensor([0, 1]), torch.tensor([2, 1]))
    with pytest.raises(KeyError):
        table.compute_rows(1, rows.normed_TC)


def test_a_checkpoint_that_has_changed_is_not_mixed_with_what_it_was(make_model) -> None:
    folder, model = make_model("mixtral")
    table = load(make_table(folder), 0, [0])
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="the weights have changed since this process started"):
        load(table, 0, [1])
    assert table.holding()[0] == (0,)


@pytest.mark.parametrize("recipe", ["llama-mha-biases", "phi3-window", "qwen3-moe-mixed"])
def test_ranks_answer_together_what_one_answers(recipe: str, make_model) -> None:
    folder, _ = make_model(recipe)
    alone = make_table(folder)
    config = alone.config

    def compute(table: ExpertTable) -> list[torch.Tensor]:
        answers = []
        for layer in range(config.num_layers):
            if config.is_sparse(layer):
                load(table, layer, range(config.moe.num_experts))
                answers.append(slots(table, layer, draw(table, 5)))
            else:
                load(table, layer, [0])
                rows_TC = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(3))
                answers.append(table.compute_rows(layer, rows_TC))
        return answers

    for answers in run_ranks(3, lambda group: compute(make_table(folder, group=group))):
        for answer, expected in zip(answers, compute(alone), strict=True):
            torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
