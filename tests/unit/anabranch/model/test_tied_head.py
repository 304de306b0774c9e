"""A stored LM head counts where it differs from the embedding that the configuration ties it to."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from anabranch.kernels.plain import PlainKernels
from anabranch.model import tied_head
from anabranch.model.load import load_model
from anabranch.model.size import weight_bytes
from anabranch.model.sources import resolve_model
from anabranch.model.tied_head import EMBEDDING, LM_HEAD
from anabranch.model.weights import SINGLE_NAME
from anabranch.parallel.group import SingleRank
from anabranch.parallel.threads import run_ranks
from tests.support.families import VOCAB
from tests.support.gguf import write_gguf

pytestmark = pytest.mark.unit


def restore(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """Put tensors into a checkpoint, by `embedding` and `head`, or take them out."""
    stored = load_file(folder / SINGLE_NAME)
    for name, tensor in tensors.items():
        key = {"embedding": EMBEDDING, "head": LM_HEAD}[name]
        stored.pop(key, None)
        if tensor is not None:
            stored[key] = tensor.contiguous()
    save_file(stored, folder / SINGLE_NAME, metadata={"format": "pt"})
    return folder


@pytest.fixture
def head() -> torch.Tensor:
    return torch.randn((VOCAB, 48), generator=torch.Generator().manual_seed(11)) * 0.3


@pytest.mark.parametrize("last_row_alone", [False, True])
def test_a_head_that_differs_is_used_as_in_transformers(
    make_model, load, session, prompt, reference_tokens, head, last_row_alone, caplog, monkeypatch
) -> None:
    # Small pieces: the difference may be in any of them.
    monkeypatch.setattr(tied_head, "CHUNK_BYTES", 4 * 48 * 10)
    folder, tied = make_model("llama-gqa-tied")
    if last_row_alone:
        different = tied.state_dict()[EMBEDDING].clone()
        different[-1] += 1.0
        head = different
    restore(folder, head=head)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(reference.lm_head.weight, head)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    with caplog.at_level(logging.WARNING):
        model = load(folder)
    assert f"{folder / SINGLE_NAME}: {LM_HEAD} differs from the embedding and is used" in caplog.text
    torch.testing.assert_close(session(model).feed(prompt), expected, atol=2e-4, rtol=1e-4)
    tokens = reference_tokens(reference, prompt, 20)
    assert session(model).generate(prompt, 20) == tokens
    if not last_row_alone:
        assert tokens != reference_tokens(tied, prompt, 20)


def test_ranks_take_their_uneven_shares_of_it(make_model, load, session, prompt, reference_tokens, head) -> None:
    folder, _ = make_model("qwen2-window-layers")
    restore(folder, head=head)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = reference_tokens(reference, prompt, 20)
    for tokens in run_ranks(3, lambda group: session(load(folder, group)).generate(prompt, 20)):
        assert tokens == expected


def test_the_same_values_twice_are_one_tensor(make_model, load, prompt, session, reference_tokens, caplog) -> None:
    folder, reference = make_model("llama-gqa-tied")
    restore(folder, head=reference.state_dict()[EMBEDDING].clone())
    model = load(folder)
    assert model.attention.lm_head.weight_VC is model.attention.embedding.weight_VC
    assert not caplog.records
    assert session(model).generate(prompt, 20) == reference_tokens(reference, prompt, 20)


def test_the_head_alone_serves_for_both(make_model, load, prompt, session, reference_tokens) -> None:
    folder, reference = make_model("llama-gqa-tied")
    restore(folder, head=reference.state_dict()[EMBEDDING].clone(), embedding=None)
    assert session(load(folder)).generate(prompt, 20) == reference_tokens(reference, prompt, 20)


def test_memory_is_counted_and_processes_agree(make_model, head) -> None:
    folder, _ = make_model("llama-gqa-tied")
    source = resolve_model(str(folder))
    tied = source.config()
    restore(folder, head=head)
    config = source.config()
    opened, weights = source.open()
    weights.close()
    assert (tied.tie_embeddings, config.tie_embeddings, opened.tie_embeddings) == (True, False, False)
    assert weight_bytes(config, "float32") - weight_bytes(tied, "float32") == VOCAB * 48 * 4
    loaded, _ = load_model(
        source, dtype=torch.float32, device=torch.device("cpu"), kernels=PlainKernels(), group=SingleRank()
    )
    assert not loaded.tie_embeddings
    # Without weights, as beside an orchestrator alone, the configuration's word counts.
    (folder / SINGLE_NAME).unlink()
    assert source.config().tie_embeddings


def test_a_head_of_another_shape_is_refused(make_model, load) -> None:
    folder, _ = make_model("llama-gqa-tied")
    restore(folder, head=torch.zeros(VOCAB + 3, 48))
    with pytest.raises(Exception, match=rf"{LM_HEAD} has shape \[104, 48\], the configuration expects \[101, 48\]"):
        load(folder)


def test_the_output_of_a_gguf_file_is_used(make_model, load, session, prompt, reference_tokens, tmp_path) -> None:
    _, untied = make_model("llama-gqa-tied", tie_word_embeddings=False)
    write_gguf(tmp_path / "tiny.gguf", untied)
    assert not json.loads((tmp_path / "llama-gqa-tied" / "config.json").read_text())["tie_word_embeddings"]
    assert session(load(tmp_path / "tiny.gguf")).generate(prompt, 20) == reference_tokens(untied, prompt, 20)
    config = resolve_model(str(tmp_path / "tiny.gguf")).config()
    assert not config.tie_embeddings
