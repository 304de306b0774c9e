"""Shards on several ranks, in threads, give the tokens of the whole model."""

from __future__ import annotations

import pytest
import torch

from anabranch.errors import ConfigError
from anabranch.parallel.threads import run_ranks

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("tp", [3, 4])
def test_every_family_and_uneven_degree_equals_transformers(
    tp, recipe, make_model, load, session, prompt, reference_tokens
) -> None:
    folder, reference = make_model(recipe)
    if tp > reference.config.num_attention_heads:
        with pytest.raises(ConfigError, match="query heads"):
            run_ranks(tp, lambda group: load(folder, group))
        return
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    tokens = reference_tokens(reference, prompt, 20)

    def rank(group) -> tuple[torch.Tensor, list[int], int]:
        model = load(folder, group)
        weights = sum(layer.qkv.weight_FC.numel() for layer in model.attention.layers)
        return session(model).feed(prompt), session(model).generate(prompt, 20), weights

    results = run_ranks(tp, rank)
    for logits, generated, _ in results:
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
        assert generated == tokens
    whole = sum(layer.qkv.weight_FC.numel() for layer in load(folder).attention.layers)
    assert all(num_weights < whole for _, _, num_weights in results)


def test_bias_of_a_row_parallel_projection_is_added_once(make_model, load) -> None:
    folder, _ = make_model("llama-mha-biases")
    held = run_ranks(3, lambda group: load(folder, group).attention.layers[0].output.bias_F is not None)
    assert held == [True, False, False]
