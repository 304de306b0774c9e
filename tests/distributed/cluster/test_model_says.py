"""A model whose files say one thing in two places: what the gateway reports is what the workers do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from anabranch.model.sources import resolve_model
from anabranch_client import Client, ContextExceeded, Sampling
from launch.reference import Reference
from tests.support.families import VOCAB, save
from tests.support.in_process import InProcessCluster

pytestmark = pytest.mark.distributed

STRETCHED = 512
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied to its embedding, with a head of its own; trained to 128 tokens and stretched; no end in its config."""
    folder = save("llama-gqa-tied", tmp_path_factory.mktemp("model"), rope_parameters=YARN, eos_token_id=None)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(23)
    tensors["lm_head.weight"] = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return folder


@pytest.fixture(scope="module")
def prompt() -> tuple[int, ...]:
    return tuple((5 * i * i + 7 * i + 3) % VOCAB for i in range(300))


@pytest.fixture(scope="module")
def answer(folder: Path, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """transformers' own, past any end."""
    torch.set_num_threads(1)
    return Reference(resolve_model(str(folder))).generate(prompt, 16, ignore_eos=True).token_ids


@pytest.fixture(scope="module")
def end(folder: Path, answer: tuple[int, ...]) -> int:
    """A token late in the answer, made the tokenizer's end of sequence: nothing else names it."""
    end = next(token for place, token in enumerate(answer) if place > 3 and token not in answer[:place])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = f"w{end}"
    tokenizer.save_pretrained(folder)
    return end


@pytest.fixture(params=[("colocated",), ("prefill", "decode")], ids=lambda roles: "-".join(roles))
def client(request: pytest.FixtureRequest, folder: Path, end: int, tmp_path: Path) -> Iterator[Client]:
    with (
        InProcessCluster(tmp_path, folder, request.param, max_context=1024) as cluster,
        Client(cluster.endpoint, timeout_s=30.0) as client,
    ):
        yield client
        cluster.wait_idle()


def test_workers_stop_count_and_compute_as_the_gateway_says(client, prompt, answer, end) -> None:
    model = client.model()
    assert (model.eos_token_ids, model.max_context) == ((end,), STRETCHED)
    greedy = {"max_tokens": len(answer), "temperature": 0.0}
    assert client.complete(prompt, Sampling(**greedy, ignore_eos=True)).token_ids == answer
    stopped = client.complete(prompt, Sampling(**greedy))
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", answer[: answer.index(end) + 1])
    assert stopped.text.split() == [f"w{token}" for token in stopped.token_ids[:-1]]
    with pytest.raises(ContextExceeded, match=rf"the context of {STRETCHED} has room for 212"):
        client.complete(prompt, Sampling(max_tokens=213))
