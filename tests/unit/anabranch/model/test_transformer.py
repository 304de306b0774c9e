"""The forward pass: halves joined or fused, chunks, ragged sampling, low precision, shared weights."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("recipe", ["llama-gqa-tied", "qwen2-moe-mixed"])
def test_layers_joined_one_by_one_equal_the_fused_pass(recipe, make_model, load, session, prompt) -> None:
    folder, _ = make_model(recipe)
    model = load(folder)
    expected = session(model).feed(prompt)
    plain = session(model)
    with torch.inference_mode():
        stack = model.attention
        hidden = stack.embed(torch.tensor(prompt))
        cos, sin = stack.rotary.forward(torch.arange(len(prompt)))
        for first, second in zip(stack.layers, model.ffn.layers, strict=True):
            hidden, normed = first.step(hidden, None, cos, sin, plain.attention)
            hidden = hidden + second.forward(first.choose(normed))
        logits = stack.logits(hidden, torch.zeros_like(hidden))
        assert torch.equal(stack.lm_head.gather(logits), expected)


@pytest.mark.parametrize("cut", [1, 8, 18])
def test_a_prompt_in_chunks_gives_the_same_logits(cut, make_model, load, session, prompt) -> None:
    folder, _ = make_model("qwen2-window-layers")
    model = load(folder)
    whole = session(model).feed(prompt)
    chunked = session(model)
    parts = torch.cat((chunked.feed(prompt[:cut]), chunked.feed(prompt[cut:])))
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_logits_come_for_the_sampled_rows_alone(make_model, load, session, prompt) -> None:
    folder, _ = make_model("mixtral")
    model = load(folder)
    every = session(model).feed(prompt)
    for rows in ([3, 18], []):
        calls = model.attention.forward(
            torch.tensor(prompt),
            torch.arange(len(prompt)),
            session(model).attention,
            torch.tensor(rows, dtype=torch.int64),
        )
        sampled = model.run(calls)
        assert sampled.shape == (len(rows), model.attention.config.vocab_size)
        torch.testing.assert_close(sampled, every[rows], atol=1e-5, rtol=1e-5)


def test_tied_weights_are_one_tensor(make_model, load) -> None:
    folder, _ = make_model("llama-gqa-tied")
    tied = load(folder)
    assert tied.attention.lm_head.weight_VC is tied.attention.embedding.weight_VC
    folder, _ = make_model("qwen3-odd")
    untied = load(folder)
    assert untied.attention.lm_head.weight_VC is not untied.attention.embedding.weight_VC


def test_bfloat16_is_close_to_float32(make_model, load, session, prompt) -> None:
    folder, _ = make_model("qwen3-moe-sparse")
    logits = session(load(folder, dtype=torch.bfloat16)).feed(prompt)
    assert logits.dtype == torch.float32
    expected = session(load(folder)).feed(prompt)
    assert torch.nn.functional.cosine_similarity(logits, expected).min() > 0.97


def test_progress_counts_every_part(make_model) -> None:
    from anabranch.kernels.plain import PlainKernels
    from anabranch.model.load import load_model
    from anabranch.parallel.group import SingleRank

    folder, _ = make_model("llama-gqa-tied")
    seen: list[tuple[int, int]] = []
    load_model(
        str(folder),
        dtype=torch.float32,
        device=torch.device("cpu"),
        kernels=PlainKernels(),
        group=SingleRank(),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 8) for done in range(1, 9)]
