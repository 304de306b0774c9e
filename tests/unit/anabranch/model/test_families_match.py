"""Every family, in odd shapes, against transformers: logits and greedy tokens."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.unit


def test_logits_and_greedy_tokens_equal_transformers(
    recipe, make_model, load, session, prompt, reference_tokens
) -> None:
    folder, reference = make_model(recipe)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    model = load(folder)
    torch.testing.assert_close(session(model).feed(prompt), expected, atol=2e-4, rtol=1e-4)
    assert session(model).generate(prompt, 24) == reference_tokens(reference, prompt, 24)
