"""The known model itself: converted folder, GGUF file, tokenizer and chat template, against transformers."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers

from anabranch.errors import CheckpointError, InvalidRequest
from anabranch.model.known import KNOWN_MODELS
from anabranch.model.sources import ModelSource, resolve_model
from anabranch.model.stop_ids import stop_ids
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


@pytest.fixture(scope="module")
def gguf(source) -> Tokenizer:
    path = KNOWN_MODELS["smollm2-135m"].gguf_file()
    return Tokenizer(ModelSource(name="smollm2", path=path, kind="gguf"))


@pytest.fixture(scope="module")
def original(source) -> tokenizers.Tokenizer:
    """Its makers' tokenizer: single digits first, then GPT-2's cut, over the package's vocabulary and merges."""
    model = json.loads((source.path / "tokenizer.json").read_text())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=model["vocab"], merges=merges))
    cut = tokenizers.pre_tokenizers
    made.pre_tokenizer = cut.Sequence([cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)])
    return made


def test_the_converted_folder_and_the_gguf_file_cut_as_the_makers_did(tokenizer, gguf, original) -> None:
    assert tokenizer.encode("a\n\n2") == [81, 1116, 34]
    rng = random.Random(5)
    texts = [
        "a\n\n2",
        "Steps:\n\n1. one\n\n2. two",
        "x =  5",
        "\t12\t\t345",
        "it's  IT'S",
        "1234567 \u00bd",
        "\r\n \n9",
    ]
    texts += ["".join(rng.choices("aeit's 0129  \n\n\t\r.,-=\u00e9\u4e2d", k=rng.randrange(1, 40))) for _ in range(500)]
    for text in texts:
        expected = original.encode(text).ids
        assert tokenizer.encode(text) == expected, text
        assert gguf.encode(text) == expected, text


def test_the_folder_ends_answers_where_the_file_does(source, tokenizer, gguf) -> None:
    file = ModelSource(name="smollm2", path=KNOWN_MODELS["smollm2-135m"].gguf_file(), kind="gguf")
    # <|im_end|>, which the file names, and <|endoftext|>, which its vocabulary has.
    assert stop_ids(source.config(), tokenizer.eos_token_ids) == (2, 0)
    assert stop_ids(file.config(), gguf.eos_token_ids) == (2, 0)


def test_chat_template(tokenizer) -> None:
    ids = tokenizer.encode(tokenizer.render_chat(QUESTION), add_special_tokens=False)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("Answer briefly.<|im_end|>\n<|im_start|>assistant\n")


def test_a_model_without_template_or_tokenizer(tokenizer, make_model, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "has_chat_template", False)
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.render_chat(QUESTION)
    folder, _ = make_model("llama-gqa-tied")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        Tokenizer(resolve_model(str(folder)))


def test_greedy_answer_equals_transformers(source, tokenizer, load, session, reference_tokens) -> None:
    ids = tokenizer.encode(tokenizer.render_chat(QUESTION), add_special_tokens=False)
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
from anabranch.model.known import KNOWN_MODELS
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
