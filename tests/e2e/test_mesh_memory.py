"""KV memory of a mesh: each of n context-parallel ranks holds 1/n of a request's blocks, and they serve it together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine
from anabranch.errors import ConfigError
from anabranch.parallel.placement import BlockCyclic
from anabranch_client import Client, ContextExceeded, Sampling, Tokens
from decode.rank import ROOM
from decode.worker import DecodeWorker
from runtime.generation.commands import GenerationEvent
from runtime.generation.rank import GenerationRank
from tests.support.in_process import InProcessCluster, wait_until
from tests.support.known import Known

pytestmark = pytest.mark.e2e

CONTEXT = 2560
BLOCK = 8
# Divisible by every degree below.
NUM_BLOCKS = 120
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return Known("llama-gqa-tied", tmp_path_factory.mktemp("tiny"), CONTEXT)


@pytest.fixture
def held_ranks(monkeypatch: pytest.MonkeyPatch) -> list[GenerationRank]:
    """The ranks of the workers that a test starts, as they are made."""
    ranks: list[GenerationRank] = []

    def make(config: WorkerConfig, engine: Engine, emit: Callable[[GenerationEvent], None]) -> GenerationRank:
        ranks.append(GenerationRank(config, engine, emit))
        return ranks[-1]

    monkeypatch.setattr("decode.worker.ROOM", msgspec.structs.replace(ROOM, make_rank=make))
    return ranks


def num_written(rank: GenerationRank) -> int:
    """Tokens whose KV of all layers a rank holds."""
    # [layers, K and V, blocks, block, heads, dim]
    return int(rank.engine.kv.data.ne(0).any(-1).any(-1).all(0).all(0).sum())


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (1, 2), (1, 3), (1, 4), (2, 2)])
def test_a_rank_holds_its_share_to_the_block(
    tp: int, cp: int, model: Known, held_ranks: list[GenerationRank], tmp_path: Path
) -> None:
    prompt, _ = model.clear(777, 1)
    pool_bytes = NUM_BLOCKS // cp * model.block_bytes(BLOCK) // tp
    with (
        InProcessCluster(
            tmp_path,
            model.folder,
            ("colocated",),
            tp=tp,
            cp=cp,
            block_size=BLOCK,
            kv_cache_bytes=pool_bytes,
            rank_processes=False,
        ) as cluster,
        Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client,
    ):
        worker = cluster.workers[0]
        assert worker.stats().num_total_blocks == NUM_BLOCKS // cp
        assert len(held_ranks) == tp * cp
        for rank in held_ranks:
            # The pool is all KV memory of a rank; the warm-up has left something in it.
            assert rank.engine.kv.num_bytes == pool_bytes
            rank.engine.kv.data.zero_()
        with client.generate(prompt, Sampling(max_tokens=150, temperature=0.0, ignore_eos=True)) as stream:
            assert any(isinstance(event, Tokens) for event in stream)
            with cluster.held("colocated-0"):
                stats = worker.stats()
                (sequence,) = worker.scheduler.running  # type: ignore[attr-defined]
                num_used = stats.num_total_blocks - stats.num_free_blocks
                # Steps in flight bring a token each beside what has been computed.
                num_tokens = sequence.num_computed + len(worker._in_flight[0])  # type: ignore[attr-defined]
                assert num_used == -(-num_tokens // (BLOCK * cp))
                placement = BlockCyclic(block_size=BLOCK, cp=cp)
                wanted = [placement.num_local(num_tokens, r.engine.context.cp_rank) for r in held_ranks]
                # The driver does not wait for what the others do last in a step.
                wait_until(
                    lambda: [num_written(rank) for rank in held_ranks] == wanted, f"{wanted} tokens on the ranks"
                )
        cluster.wait_idle()


def test_a_context_that_fits_no_rank_is_served_by_four(model: Known, tmp_path: Path) -> None:
    prompt, answer = model.clear(2000, 12)
    small = {"kv_cache_bytes": 600 // BLOCK * model.block_bytes(BLOCK), "block_size": BLOCK}
    with (
        InProcessCluster(tmp_path, model.folder, ("prefill", "decode"), cp=4, rank_processes=False, **small) as cluster,
        Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client,
    ):
        completion = client.complete(prompt, Sampling(max_tokens=12, temperature=0.0, ignore_eos=True))
        assert completion.token_ids == answer
        assert cluster.worker("decode-1").engine.max_context == 4 * 600  # type: ignore[attr-defined]
        cluster.wait_idle()
    with (
        InProcessCluster(tmp_path, model.folder, ("prefill", "decode"), **small) as cluster,
        Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client,
        pytest.raises(ContextExceeded, match="600"),
    ):
        client.complete(prompt, Sampling(max_tokens=12))


LONG = 32768
LONG_ANSWER = 12
# Two narrow layers, so that transformers' own answer takes two seconds.
NARROW = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
LONG_BLOCK = 16
# A quarter of the long context: 513 blocks on each rank.
LONG_NUM_BLOCKS = -(-(LONG + LONG_ANSWER) // (4 * LONG_BLOCK))


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return Known("llama-gqa-tied", tmp_path_factory.mktemp("long"), LONG + 256, **NARROW)


def test_32k_tokens_on_ranks_that_hold_a_quarter_each(long_model: Known, tmp_path: Path) -> None:
    """Ranks of the decode worker are processes; no rank of either worker holds more than a quarter of the context."""
    prompt, answer = long_model.clear(LONG, LONG_ANSWER)
    pool = {"kv_cache_bytes": LONG_NUM_BLOCKS * long_model.block_bytes(LONG_BLOCK), "block_size": LONG_BLOCK}
    by_role = {
        "prefill": {"cp": 4, "max_step_tokens": 8192, "rank_processes": False},
        "decode": {"cp": 4, "max_context": LONG + LONG_ANSWER},
    }
    sampling = Sampling(max_tokens=LONG_ANSWER, temperature=0.0, ignore_eos=True)
    with (
        InProcessCluster(tmp_path, long_model.folder, ("prefill", "decode"), by_role=by_role, **pool) as cluster,
        Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client,
    ):
        decode = cluster.worker("decode-1")
        assert len(decode.ranks._group.pids) == 3  # type: ignore[attr-defined]
        assert decode.engine.kv.num_bytes == pool["kv_cache_bytes"]  # type: ignore[attr-defined]
        completion = client.complete(prompt, sampling)
        assert completion.token_ids == answer
        assert completion.usage.num_prompt_tokens == LONG
        cluster.wait_idle()


def test_one_rank_with_a_quarter_refuses_32k_tokens(long_model: Known, tmp_path: Path) -> None:
    pool = {"kv_cache_bytes": LONG_NUM_BLOCKS * long_model.block_bytes(LONG_BLOCK), "block_size": LONG_BLOCK}
    held = LONG_NUM_BLOCKS * LONG_BLOCK
    with (
        InProcessCluster(
            tmp_path,
            long_model.folder,
            ("prefill", "decode"),
            by_role={"prefill": {"kv_cache_bytes": 16 << 20}},
            **pool,
        ) as cluster,
        Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client,
    ):
        with pytest.raises(ContextExceeded) as refused:
            client.complete((3,) * LONG, Sampling(max_tokens=LONG_ANSWER))
        assert str(refused.value) == (
            f"prompt: has {LONG} tokens; the context holds {held}, and the answer needs at least 1; "
            f"the KV pool of decode-1 has {LONG_NUM_BLOCKS} blocks of {LONG_BLOCK} tokens: "
            "for more, raise kv_cache or cp of the decode pool"
        )
        with pytest.raises(ContextExceeded, match=f"has room for {held - 10}; the KV pool of decode-1 has"):
            client.complete((3,) * 10, Sampling(max_tokens=LONG))
    # Where the context is asked for by name, the worker does not even start.
    worker = DecodeWorker(
        WorkerConfig(
            role="decode",
            name="decode-0",
            orchestrator="",
            model=str(long_model.folder),
            dtype="float32",
            max_context=LONG + LONG_ANSWER,
            **pool,
        )
    )
    with pytest.raises(ConfigError) as impossible:
        worker.build()
    worker.close()
    assert str(impossible.value).startswith(f"max_context: {LONG + LONG_ANSWER}: does not fit the KV pool: ")
    assert str(impossible.value).endswith(f"hold {held}; raise kv_cache to 9 MiB, or cp to 4, or lower it")
