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
        hidden = model.embed(torch.tensor(prompt))
        cos, sin = model.rotary.forward(torch.arange(len(prompt)))
        for layer in model.layers:
            hidden = layer.forward(hidden, cos, sin, plain.attention)
        assert torch.equal(model.lm_head.gather(model.logits(hidden)), expected)


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
        sampled = model.forward(
            torch.tensor(prompt),
            torch.arange(len(prompt)),
            session(model).attention,
            torch.tensor(rows, dtype=torch.int64),
        )
        assert sampled.shape == (len(rows), model.config.vocab_size)
        torch.testing.assert_close(sampled, every[rows], atol=1e-5, rtol=1e-5)


def test_tied_weights_are_one_tensor(make_model, load) -> None:
    folder, _ = make_model("llama-gqa-tied")
    tied = load(folder)
    assert tied.lm_head.weight_VC is tied.embedding.weight_VC
    folder, _ = make_model("qwen3-odd")
    untied = load(folder)
    assert untied.lm_head.weight_VC is not untied.embedding.weight_VC


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
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
