"""SmolLM2 in float32: every topology gives transformers' tokens, prompts of 1 to 3,000 tokens, 16 at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from anabranch.model.known import KNOWN_MODELS
from anabranch_client import Client, Completion, Sampling
from tests.support.in_process import InProcessCluster
from tests.support.known import Prompt, smollm2_answers
from transport.planes import usable_planes

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# Length of a prompt -> tokens to compare.
WANTED = dict.fromkeys((1, 2, 3, 5, 7, 16, 31, 48, 63, 64, 65, 90, 150, 200), 8) | {17: 72, 130: 64, 3000: 8}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A topology and the prompts, by length, that it answers all at once."""

    roles: tuple[str, ...]
    lengths: tuple[int, ...]
    options: dict[str, object] = field(default_factory=dict)
    gguf: bool = False


SPLIT = ("prefill", "decode")
TOPOLOGIES = {
    "colocated": Case(roles=("colocated",), lengths=(2, 65, 130)),
    "colocated-native": Case(roles=("colocated",), lengths=tuple(WANTED), options={"native_kernels": True}),
    "split-tcp": Case(roles=SPLIT, lengths=(2, 17, 65, 130), options={"kv_transport": "tcp", "native_kernels": True}),
    "gguf-native": Case(roles=("colocated",), lengths=(48, 90), options={"native_kernels": True}, gguf=True),
    "split-ucx": Case(
        roles=SPLIT,
        lengths=tuple(WANTED),
        options={"kv_transport": "ucx", "native_kernels": True, "max_step_tokens": 97},
    ),
}


@pytest.fixture(scope="module")
def expected() -> dict[int, tuple[Prompt, Prompt]]:
    """Length -> a prompt and transformers' greedy answer."""
    torch.set_num_threads(2)
    known = smollm2_answers()
    return {length: known.clear(length, num_tokens) for length, num_tokens in WANTED.items()}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_tokens_equal_the_reference(name: str, expected: dict[int, tuple[Prompt, Prompt]], tmp_path: Path) -> None:
    case = TOPOLOGIES[name]
    plane = case.options.get("kv_transport")
    if plane is not None and plane not in usable_planes():
        pytest.skip(f"the {plane} plane cannot be used here")

    model = KNOWN_MODELS["smollm2-135m"].gguf_file() if case.gguf else "smollm2-135m"
    assert model is not None

    def ask(length: int) -> Completion:
        prompt, answer = expected[length]
        return client.complete(prompt, Sampling(max_tokens=len(answer), temperature=0.0, ignore_eos=True))

    with (
        InProcessCluster(tmp_path, model, case.roles, kv_cache_bytes=320 << 20, **case.options) as cluster,
        Client(cluster.endpoint) as client,
    ):
        with ThreadPoolExecutor(len(WANTED)) as pool:
            together = list(pool.map(ask, case.lengths))
        for length, answer in zip(case.lengths, together, strict=True):
            assert answer.token_ids == expected[length][1], f"prompt of {length} tokens, together"
        for length in [length for length in case.lengths if len(expected[length][1]) == 8][-2:]:
            again = ask(length)
            assert again.token_ids == expected[length][1], f"prompt of {length} tokens, from the prefix cache"
            assert again.usage.num_cached_tokens == (length - 1) // 16 * 16
        if plane is not None:
            assert together[-1].kv is not None
            assert together[-1].kv.transport == plane
        cluster.wait_idle()
