"""Every family, tiny and random: each topology gives transformers' greedy tokens.

Prompts of 1 to 400 tokens (3,000 once), alone and sixteen at a time, in chunks, from the prefix cache, and in
pools so small that requests preempt each other.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anabranch_client import Client, Completion, Sampling
from tests.support.families import RECIPES
from tests.support.in_process import InProcessCluster
from tests.support.known import Known, Prompt
from transport.planes import usable_planes

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("one_thread")]

# One or two of each family; between them windows, biases, every rope, dense and sparse layers mixed.
FAMILIES = (
    "llama-gqa-tied",
    "llama-mqa-llama3",
    "mistral-window",
    "qwen2-window-layers",
    "qwen2-full-dynamic",
    "qwen3-odd",
    "qwen3-yarn",
    "mixtral",
    "mixtral-window",
    "qwen2-moe-mixed",
    "qwen2-moe-norm-window",
    "qwen3-moe-mixed",
    "qwen3-moe-sparse",
    "phi3-window",
    "phi3-longrope-partial",
)
# Name -> roles, options of every worker.
TOPOLOGIES: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "colocated": (("colocated",), {"max_step_tokens": 61}),
    "inproc": (("prefill", "decode"), {"kv_transport": "inproc", "max_step_tokens": 48}),
    "tcp": (("prefill", "decode"), {"kv_transport": "tcp"}),
    "ucx": (("prefill", "decode"), {"kv_transport": "ucx", "max_step_tokens": 97, "native_kernels": True}),
}
PLANES = ("inproc", "tcp", "ucx")
# Every family colocated and over one of the planes, in turn.
PAIRS = [
    (recipe, topology)
    for number, recipe in enumerate(FAMILIES)
    for topology in ("colocated", PLANES[number % len(PLANES)])
]
LENGTHS = (1, 2, 3, 15, 16, 17, 33, 64, 90, 130, 257, 400)
CONTEXT = 448
NUM_TOKENS = 24


@pytest.fixture(params=TOPOLOGIES)
def topology(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    need(name)
    return name


def need(topology: str) -> None:
    """Skip where a topology's plane cannot be used."""
    if topology in PLANES and topology not in usable_planes():
        pytest.skip(f"the {topology} plane cannot be used here")


def ask(client: Client, prompt: Prompt, num_tokens: int) -> Completion:
    return client.complete(prompt, Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True))


def check_all(client: Client, expected: dict[Prompt, Prompt], at_once: int = 16) -> list[Completion]:
    """Ask for everything, `at_once` at a time, and compare; the answers in the order of `expected`."""
    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(lambda item: ask(client, item[0], len(item[1])), expected.items()))
    for (prompt, answer), completion in zip(expected.items(), found, strict=True):
        assert completion.token_ids == answer, f"prompt of {len(prompt)} tokens"
    return found


@pytest.mark.parametrize(("recipe", "topology"), PAIRS)
def test_tokens_equal_transformers(
    recipe: str,
    topology: str,
    known: Callable[..., Known],
    answers: Callable[[str], dict[Prompt, Prompt]],
    tmp_path: Path,
) -> None:
    need(topology)
    expected = answers(recipe)
    roles, options = TOPOLOGIES[topology]
    with (
        InProcessCluster(tmp_path, known(recipe).folder, roles, **options) as cluster,
        Client(cluster.endpoint) as client,
    ):
        for completion in check_all(client, expected):
            assert completion.route == tuple(worker.config.name for worker in cluster.workers)
            assert (completion.kv.transport if completion.kv else "colocated") == topology
        cluster.wait_idle()
        # Again, one at a time: what is full of the prompts comes from the prefix cache.
        for prompt in list(expected)[-2:]:
            completion = ask(client, prompt, NUM_TOKENS)
            assert completion.token_ids == expected[prompt]
            assert completion.usage.num_cached_tokens == (len(prompt) - 1) // 16 * 16
        cluster.wait_idle()


def test_a_common_beginning_is_computed_once(topology: str, known: Callable[..., Known], tmp_path: Path) -> None:
    model = known("mistral-window")
    first, answer = model.clear(150, NUM_TOKENS)
    others = dict(model.clear(length, NUM_TOKENS, first[:100]) for length in (101, 113, 160, 300))
    roles, options = TOPOLOGIES[topology]
    with InProcessCluster(tmp_path, model.folder, roles, **options) as cluster, Client(cluster.endpoint) as client:
        check_all(client, {first: answer})
        for completion in check_all(client, others):
            assert completion.usage.num_cached_tokens == 96
        # A prompt that goes on where an answer ended shares the answer's blocks too.
        longer, last = model.clear(200, NUM_TOKENS, first + answer)
        (completion,) = check_all(client, {longer: last})
        decoded = (len(first) + len(answer) - 1) // 16 * 16
        assert completion.usage.num_cached_tokens == (decoded if topology == "colocated" else len(first) // 16 * 16)
        cluster.wait_idle()


@pytest.mark.parametrize(
    ("recipe", "topology"),
    [
        ("llama-gqa-tied", "colocated"),
        ("llama-gqa-tied", "tcp"),
        ("qwen2-moe-norm-window", "inproc"),
        ("qwen2-moe-norm-window", "ucx"),
    ],
)
def test_requests_that_give_way_go_on_where_they_were(
    recipe: str, topology: str, known: Callable[..., Known], tmp_path: Path
) -> None:
    need(topology)
    model = known(recipe)
    expected = dict(model.clear(length, 60) for length in (5, 9, 12, 20, 26, 31, 40, 44))
    roles, options = TOPOLOGIES[topology]
    # 16 blocks of 8 tokens hold one of the longer requests whole, and little beside it.
    small: dict[str, object] = {"kv_cache_bytes": 16 * model.block_bytes(8), "block_size": 8, "max_context": 112}
    with (
        InProcessCluster(
            tmp_path, model.folder, roles, by_role={"decode": small, "colocated": small}, **options
        ) as cluster,
        Client(cluster.endpoint) as client,
    ):
        holder = cluster.workers[-1]
        assert holder.stats().num_total_blocks == 16
        check_all(client, expected)
        assert holder.scheduler.num_preempted > 0
        cluster.wait_idle()
        check_all(client, dict(list(expected.items())[:2]), at_once=1)


def test_a_long_prompt(topology: str, known: Callable[..., Known], tmp_path: Path) -> None:
    model = known("qwen3-moe-mixed", 4096)
    roles, options = TOPOLOGIES[topology]
    options = {**options, "max_step_tokens": 700, "kv_cache_bytes": 64 << 20}
    expected = dict(model.clear(length, 16) for length in (3000, 1100, 7))
    with InProcessCluster(tmp_path, model.folder, roles, **options) as cluster, Client(cluster.endpoint) as client:
        check_all(client, expected)
        cluster.wait_idle()


def test_every_family_is_covered() -> None:
    assert {RECIPES[recipe][0] for recipe in FAMILIES} == {family for family, _ in RECIPES.values()}
