"""The known model itself: converted folder, GGUF file, tokenizer and chat template, against transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers

from anabranch.errors import CheckpointError, InvalidRequest
from anabranch.model.sources import ModelSource, resolve_model
from anabranch.model.tokenizer import Tokenizer

pytestmark = [pytest.mark.unit, pytest.mark.slow]

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="module")
def tokenizer(source) -> Tokenizer:
    return Tokenizer(source)


def test_text_goes_to_ids_and_back(tokenizer) -> None:
    text = "Größe, naïve, 日本語 🙂, <|im_start|> tabs\tand\n\nlines  "
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.decode([1, *tokenizer.encode("Hello")]) == "Hello"
    assert tokenizer.encode("") == []
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (49152, (2,))


def test_chat_template(tokenizer) -> None:
    ids = tokenizer.apply_chat(QUESTION)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("Answer briefly.<|im_end|>\n<|im_start|>assistant\n")


def test_a_model_without_template_or_tokenizer(tokenizer, make_model, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "has_chat_template", False)
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.apply_chat(QUESTION)
    folder, _ = make_model("llama-gqa-tied")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        Tokenizer(resolve_model(str(folder)))


def test_greedy_answer_equals_transformers(source, tokenizer, load, session, reference_tokens) -> None:
    ids = tokenizer.apply_chat(QUESTION)
    reference = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = reference(torch.tensor([ids])).logits[0]
    expected = reference_tokens(reference, ids, 24)
    del reference
    assert tokenizer.decode(expected).startswith("The capital of France is Paris.")
    model = load(source.path)
    torch.testing.assert_close(session(model).feed(ids), logits, atol=2e-3, rtol=1e-4)
    assert session(model).generate(ids, 24) == expected


MEASURE = """
import re, torch, transformers
from anabranch.kernels.plain import PlainKernels
from anabranch.model.load import load_model
from anabranch.model.sources import resolve_model
from anabranch.parallel.group import SingleRank
torch.set_num_threads(1)
source = resolve_model("smollm2-135m")
source.config()
# Not getrusage: its maximum is handed down from the process that started this one.
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024
before = peak()
_, model = load_model(source, dtype=torch.float32, device=torch.device("cpu"), kernels=PlainKernels(),
                      group=SingleRank())
print(peak() - before, model.attention.embedding.weight_VC.nbytes)
"""


def test_loading_takes_one_copy_and_one_tensor_at_most(source) -> None:
    ran = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=100, check=True)
    grown_bytes, largest_bytes = map(int, ran.stdout.split())
    model_bytes = (source.path / "model.safetensors").stat().st_size
    assert 0.6 * model_bytes < grown_bytes < model_bytes + largest_bytes
