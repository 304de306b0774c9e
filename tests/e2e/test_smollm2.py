"""SmolLM2 in float32: every topology gives transformers' tokens, prompts of 1 to 3,000 tokens, 1 to 16 at once."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from anabranch.model.sources import resolve_model
from anabranch_client import Client, Completion, Sampling
from launch.reference import Reference
from tests.support.in_process import InProcessCluster
from transport.planes import usable_planes

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]

NUM_TOKENS = 64
LONG_TOKENS = 12
LENGTHS = (1, 2, 5, 17, 63, 64, 65, 130, 200, 31, 48, 3, 90, 150, 7)
LONG = 3000

# Name -> roles, options of every worker.
TOPOLOGIES: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "colocated": (("colocated",), {}),
    "colocated-native": (("colocated",), {"native_kernels": True}),
    "split-inproc": (("prefill", "decode"), {"kv_transport": "inproc"}),
    "split-tcp": (("prefill", "decode"), {"kv_transport": "tcp", "native_kernels": True}),
    "split-ucx": (("prefill", "decode"), {"kv_transport": "ucx", "max_step_tokens": 97}),
}


@pytest.fixture(scope="module")
def expected() -> dict[tuple[int, ...], tuple[int, ...]]:
    """Prompt -> transformers' greedy answer."""
    torch.set_num_threads(2)
    reference = Reference(resolve_model("smollm2-135m"))
    rng = random.Random(3)
    prompts = [tuple(rng.randrange(reference.vocab_size) for _ in range(length)) for length in LENGTHS]
    answers = {prompt: reference.generate(prompt, NUM_TOKENS, ignore_eos=True).token_ids for prompt in prompts}
    long = tuple(rng.randrange(reference.vocab_size) for _ in range(LONG))
    answers[long] = reference.generate(long, LONG_TOKENS, ignore_eos=True).token_ids
    return answers


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_tokens_equal_the_reference(
    name: str, expected: dict[tuple[int, ...], tuple[int, ...]], tmp_path: Path
) -> None:
    roles, options = TOPOLOGIES[name]
    plane = options.get("kv_transport")
    if plane is not None and plane not in usable_planes():
        pytest.skip(f"the {plane} plane cannot be used here")

    def ask(prompt: tuple[int, ...]) -> Completion:
        sampling = Sampling(max_tokens=len(expected[prompt]), temperature=0.0, ignore_eos=True)
        return client.complete(list(prompt), sampling)

    with (
        InProcessCluster(tmp_path, "smollm2-135m", roles, kv_cache_bytes=320 << 20, **options) as cluster,
        Client(cluster.endpoint) as client,
    ):
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(ask, expected))
        for prompt, answer in zip(expected, together, strict=True):
            assert answer.token_ids == expected[prompt], f"prompt of {len(prompt)} tokens, together"
        for prompt in list(expected)[-4:]:
            again = ask(prompt)
            assert again.token_ids == expected[prompt], f"prompt of {len(prompt)} tokens, from the prefix cache"
            assert (again.usage.num_cached_tokens > 0) == (len(prompt) > 16)
        if plane is not None:
            assert together[-1].kv is not None
            assert together[-1].kv.transport == plane
        cluster.wait_idle()
