"""Meshes of ranks: any prefill (tp, cp) with any decode (tp, cp) gives transformers' greedy tokens.

Most pairs run their ranks as threads of the test's process, with real sockets and tensor planes; those of
`PROCESSES` as processes over shared memory, as a worker of its own would.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from anabranch_client import Client, Completion, Sampling, Tokens
from tests.support.families import RECIPES, VOCAB
from tests.support.in_process import InProcessCluster
from tests.support.known import Known, Prompt
from transport.planes import usable_planes

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("one_thread")]

CONTEXT = 640
LENGTHS = (1, 2, 5, 17, 63, 410)
# Prompts whose answers are cancelled on the way.
LEAVERS = (33, 150)
NUM_TOKENS = 9
TIMEOUT_S = 60.0
Degrees = tuple[int, int]
Answers = dict[Prompt, Prompt]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A prefill and a decode mesh, each (tp, cp), and how they are run.

    Attributes:
        blocks: tokens per block on either side.
        chunk: most new tokens in a prefill step.
    """

    prefill: Degrees
    decode: Degrees
    recipe: str
    transport: str = "tcp"
    ring: str = "auto"
    blocks: Degrees = (16, 16)
    chunk: int = 1024
    processes: bool = False

    def __str__(self) -> str:
        meshes = "to".join(f"{tp}x{cp}" for tp, cp in (self.prefill, self.decode))
        return f"{meshes}-{self.recipe}-{self.ring}-{self.transport}" + "-processes" * self.processes


PAIRS = (
    # Each alone against one rank.
    Pair(prefill=(1, 2), decode=(1, 1), recipe="llama-gqa-tied", ring="pass_kv", chunk=97),
    Pair(prefill=(2, 1), decode=(1, 1), recipe="qwen2-window-layers", blocks=(16, 8), chunk=61),
    Pair(prefill=(1, 3), decode=(1, 1), recipe="mistral-window", ring="pass_q", blocks=(8, 16)),
    Pair(prefill=(1, 4), decode=(1, 1), recipe="qwen3-odd", ring="pass_q", chunk=130, transport="ucx"),
    Pair(prefill=(3, 1), decode=(1, 1), recipe="qwen3-moe-sparse"),
    Pair(prefill=(4, 1), decode=(1, 1), recipe="llama-mqa-llama3", chunk=200),
    Pair(prefill=(1, 1), decode=(1, 2), recipe="mixtral-window", blocks=(16, 4)),
    Pair(prefill=(1, 1), decode=(2, 1), recipe="qwen2-full-dynamic", chunk=61),
    Pair(prefill=(1, 1), decode=(1, 3), recipe="qwen2-moe-norm-window", transport="inproc"),
    Pair(prefill=(1, 1), decode=(3, 1), recipe="llama-mha-biases", blocks=(8, 32)),
    Pair(prefill=(1, 1), decode=(1, 4), recipe="mistral-full-linear"),
    Pair(prefill=(1, 1), decode=(4, 1), recipe="qwen3-yarn", chunk=97),
    # Any to any.
    Pair(prefill=(2, 2), decode=(1, 3), recipe="qwen3-moe-mixed", ring="pass_q", blocks=(16, 8), chunk=90),
    Pair(prefill=(1, 3), decode=(2, 2), recipe="llama-gqa-tied", ring="pass_kv", blocks=(4, 16)),
    Pair(prefill=(3, 2), decode=(2, 1), recipe="mixtral", ring="pass_q"),
    Pair(prefill=(3, 2), decode=(1, 4), recipe="qwen2-moe-mixed", ring="pass_kv", chunk=150),
    Pair(prefill=(1, 4), decode=(3, 1), recipe="mistral-window", ring="pass_kv", blocks=(16, 5), chunk=111),
    Pair(prefill=(4, 1), decode=(1, 2), recipe="mixtral-window", blocks=(7, 16)),
    Pair(prefill=(2, 1), decode=(1, 4), recipe="phi3-longrope-partial", transport="ucx"),
    Pair(prefill=(1, 2), decode=(4, 1), recipe="llama-mqa-llama3", ring="pass_q", chunk=75),
    Pair(prefill=(2, 2), decode=(2, 2), recipe="qwen2-window-layers", blocks=(16, 16), transport="inproc"),
    Pair(prefill=(2, 2), decode=(4, 1), recipe="qwen2-full-dynamic", ring="pass_kv", blocks=(8, 16)),
    Pair(prefill=(1, 3), decode=(3, 1), recipe="qwen3-odd", ring="pass_kv", chunk=100),
    Pair(prefill=(2, 1), decode=(2, 3), recipe="phi3-window", blocks=(16, 3)),
    Pair(prefill=(1, 2), decode=(1, 3), recipe="qwen3-moe-mixed", ring="pass_kv", blocks=(5, 8)),
    # With processes, over shared memory.
    Pair(prefill=(1, 2), decode=(1, 2), recipe="qwen3-odd", ring="pass_q", processes=True, chunk=97),
    Pair(prefill=(2, 1), decode=(2, 1), recipe="mixtral", processes=True, transport="ucx"),
    Pair(prefill=(2, 1), decode=(1, 2), recipe="qwen2-moe-mixed", processes=True, blocks=(16, 8)),
    Pair(prefill=(1, 2), decode=(2, 1), recipe="llama-mqa-llama3", processes=True, ring="pass_kv", transport="ucx"),
    Pair(prefill=(1, 3), decode=(1, 1), recipe="llama-gqa-tied", processes=True),
    Pair(prefill=(1, 1), decode=(3, 1), recipe="qwen3-moe-sparse", processes=True),
    Pair(prefill=(2, 2), decode=(1, 1), recipe="qwen2-window-layers", processes=True, ring="pass_kv", chunk=97),
    Pair(prefill=(1, 1), decode=(2, 2), recipe="mistral-window", processes=True, blocks=(16, 4)),
)
# Meshes that compute prompts and answers, (tp, cp), recipe, whether ranks are processes.
COLOCATED = (
    ((1, 2), "qwen3-yarn", False),
    ((2, 1), "qwen3-moe-mixed", True),
    ((2, 2), "qwen2-moe-norm-window", False),
    ((1, 3), "llama-mha-biases", False),
    ((3, 1), "mistral-window", False),
    ((1, 4), "qwen2-window-layers", False),
    ((4, 1), "llama-gqa-tied", False),
)


def mesh_of(degrees: Degrees, **options: object) -> dict[str, object]:
    return {"tp": degrees[0], "cp": degrees[1], **options}


def ask(client: Client, prompt: Prompt, num_tokens: int) -> Completion:
    return client.complete(prompt, Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True))


def leave_early(client: Client, length: int) -> None:
    """Start a long answer and cancel it after its second token."""
    rng = random.Random(length)
    prompt = tuple(rng.randrange(VOCAB) for _ in range(length))
    with client.generate(prompt, Sampling(max_tokens=200, temperature=0.0, ignore_eos=True)) as stream:
        num_tokens = 0
        for event in stream:
            num_tokens += len(event.token_ids) if isinstance(event, Tokens) else 0
            if num_tokens >= 2:
                return
    raise AssertionError("the answer ended by itself")


def check_all(client: Client, expected: Answers) -> list[Completion]:
    """Ask for everything at once, answers of different lengths, while others come and are cancelled."""
    wanted = [(prompt, answer[: len(answer) - index % 3]) for index, (prompt, answer) in enumerate(expected.items())]
    with ThreadPoolExecutor(len(wanted) + len(LEAVERS)) as pool:
        leaving = [pool.submit(leave_early, client, length) for length in LEAVERS]
        found = list(pool.map(lambda item: ask(client, item[0], len(item[1])), wanted))
        for leaver in leaving:
            leaver.result(TIMEOUT_S)
    for (prompt, answer), completion in zip(wanted, found, strict=True):
        assert completion.token_ids == answer, f"prompt of {len(prompt)} tokens"
    return found


def check_cached(client: Client, expected: Answers, span: int) -> None:
    """Ask again, one at a time: every full span of the prompt comes from the prefix cache, in its CP layout."""
    for prompt in list(expected)[-2:]:
        completion = ask(client, prompt, NUM_TOKENS)
        assert completion.token_ids == expected[prompt], f"prompt of {len(prompt)} tokens, from the prefix cache"
        assert completion.usage.num_cached_tokens == (len(prompt) - 1) // span * span


def check_alike(client: Client, expected: Answers) -> None:
    """Ask for everything at once, whole answers."""
    with ThreadPoolExecutor(len(expected)) as pool:
        found = list(pool.map(lambda item: ask(client, item[0], len(item[1])), expected.items()))
    assert [completion.token_ids for completion in found] == list(expected.values())


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_tokens_equal_transformers(
    pair: Pair, known: Callable[..., Known], answers: Callable[[str], Answers], tmp_path: Path
) -> None:
    if pair.transport not in usable_planes():
        pytest.skip(f"the {pair.transport} plane cannot be used here")
    expected = answers(pair.recipe)
    by_role = {
        "prefill": mesh_of(pair.prefill, block_size=pair.blocks[0], max_step_tokens=pair.chunk, ring=pair.ring),
        "decode": mesh_of(pair.decode, block_size=pair.blocks[1]),
    }
    with (
        InProcessCluster(
            tmp_path,
            known(pair.recipe).folder,
            ("prefill", "decode"),
            by_role=by_role,
            kv_transport=pair.transport,
            native_kernels=True,
            kv_cache_bytes=4 << 20,
            rank_processes=pair.processes,
        ) as cluster,
        Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client,
    ):
        found = check_all(client, expected)
        # Each decode rank was sent what it holds, once, and nothing else was sent.
        layout = cluster.workers[1].engine.layout  # type: ignore[attr-defined]
        num_heads = sum(len(layout.heads_of(tp_rank)) for tp_rank in range(layout.tp))
        for prompt, completion in zip(expected, found, strict=True):
            assert completion.kv is not None
            assert completion.kv.transport == pair.transport
            assert completion.kv.bytes == len(prompt) * layout.token_bytes * num_heads // layout.num_kv_heads
        cluster.wait_idle()
        check_cached(client, expected, pair.blocks[0] * pair.prefill[1])
        cluster.wait_idle()


@pytest.mark.parametrize(("degrees", "recipe", "processes"), COLOCATED)
def test_colocated_meshes_equal_transformers(
    degrees: Degrees,
    recipe: str,
    processes: bool,
    known: Callable[..., Known],
    answers: Callable[[str], Answers],
    tmp_path: Path,
) -> None:
    expected = answers(recipe)
    with (
        InProcessCluster(
            tmp_path,
            known(recipe).folder,
            ("colocated",),
            **mesh_of(degrees),
            native_kernels=True,
            max_step_tokens=61,
            kv_cache_bytes=4 << 20,
            rank_processes=processes,
        ) as cluster,
        Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client,
    ):
        check_all(client, expected)
        cluster.wait_idle()
        check_cached(client, expected, 16 * degrees[1])
        cluster.wait_idle()


@pytest.mark.parametrize(
    ("roles", "prefill", "decode", "preemption"),
    [
        (("prefill", "decode"), (1, 1), (1, 1), "offload"),
        (("prefill", "decode"), (1, 2), (1, 3), "recompute"),
        (("prefill", "decode"), (2, 1), (2, 2), "offload"),
        (("colocated",), (1, 1), (1, 1), "offload"),
        (("colocated",), (1, 1), (1, 2), "offload"),
        (("colocated",), (1, 1), (2, 2), "recompute"),
    ],
)
def test_those_that_give_way_go_on_where_they_were(
    roles: tuple[str, ...],
    prefill: Degrees,
    decode: Degrees,
    preemption: str,
    known: Callable[..., Known],
    tmp_path: Path,
) -> None:
    model = known("llama-gqa-tied")
    tp, cp = decode
    expected = dict(model.clear(length, 40) for length in (5, 12, 20, 31, 44, 60))
    # About 128 tokens of 8 to a block hold one of the longer requests whole, and little beside it.
    num_blocks = 128 // (8 * cp)
    num_bytes = num_blocks * model.block_bytes(8) // tp
    small = mesh_of(
        decode,
        kv_cache_bytes=num_bytes,
        # Room for all: those that find no host blocks would be computed again.
        offload_bytes=4 * num_bytes,
        preemption=preemption,
        block_size=8,
        max_context=112,
    )
    with (
        InProcessCluster(
            tmp_path,
            model.folder,
            roles,
            by_role={"prefill": mesh_of(prefill), "decode": small, "colocated": small},
            rank_processes=False,
        ) as cluster,
        Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client,
    ):
        holder = cluster.workers[-1]
        assert holder.stats().num_total_blocks == num_blocks
        check_alike(client, expected)
        scheduler = holder.scheduler  # type: ignore[attr-defined]
        assert scheduler.num_preempted > 0
        cluster.wait_idle()
        epochs = {epoch for _, _, epoch in cluster.minutes[holder.config.name].given}
        if preemption == "offload":
            assert scheduler.num_offloaded > 0
            assert holder.stats().num_free_host_blocks == 4 * num_blocks
            # Nobody was sent away: whoever was preempted went on in its place.
            assert epochs == {0}
        else:
            assert scheduler.num_offloaded == 0
            assert holder.stats().num_total_host_blocks == 0
            assert (len(epochs) > 1) == (len(roles) == 2)


def test_thirty_two_at_once(known: Callable[..., Known], tmp_path: Path) -> None:
    model = known("qwen3-yarn")
    expected = dict(model.clear(3 * number + 1, 2 + number % 7) for number in range(32))
    with (
        InProcessCluster(
            tmp_path,
            model.folder,
            ("prefill", "decode"),
            by_role={"prefill": mesh_of((1, 3), max_step_tokens=100), "decode": mesh_of((2, 2), max_running=20)},
            rank_processes=False,
        ) as cluster,
        Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client,
    ):
        check_alike(client, expected)
        cluster.wait_idle()


@pytest.mark.parametrize("ring", ["pass_kv", "pass_q"])
def test_a_long_prompt(ring: str, known: Callable[..., Known], tmp_path: Path) -> None:
    model = known("qwen3-moe-mixed", 4224)
    expected = dict([model.clear(4097, 4), model.clear(1000, 4)])
    with (
        InProcessCluster(
            tmp_path,
            model.folder,
            ("prefill", "decode"),
            by_role={"prefill": mesh_of((1, 4), ring=ring, max_step_tokens=1500), "decode": mesh_of((1, 3))},
            rank_processes=False,
        ) as cluster,
        Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client,
    ):
        check_alike(client, expected)
        cluster.wait_idle()


def test_every_family_and_degree_is_covered() -> None:
    recipes = {pair.recipe for pair in PAIRS} | {recipe for _, recipe, _ in COLOCATED}
    assert recipes == set(RECIPES)
    assert {(1, 2), (2, 1), (2, 2), (1, 3), (1, 4), (4, 1), (3, 2)} <= {pair.prefill for pair in PAIRS}
    assert {tp for pair in PAIRS for tp in (pair.prefill[0], pair.decode[0])} == {1, 2, 3, 4}
    assert {cp for pair in PAIRS for cp in (pair.prefill[1], pair.decode[1])} == {1, 2, 3, 4}
    assert len({(pair.prefill, pair.decode) for pair in PAIRS}) >= 24
    assert sum(pair.processes for pair in PAIRS) >= 8
