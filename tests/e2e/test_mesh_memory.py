"""KV memory of a mesh: each of n context-parallel ranks holds 1/n of a request's blocks, and they serve it together."""

from __future__ import annotations

from pathlib import Path

import pytest

from anabranch_client import Client, ContextExceeded, Sampling, Tokens
from tests.support.in_process import InProcessCluster
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


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_a_rank_holds_its_share_to_the_block(cp: int, model: Known, tmp_path: Path) -> None:
    prompt, _ = model.clear(777, 1)
    with (
        InProcessCluster(
            tmp_path,
            model.folder,
            ("colocated",),
            cp=cp,
            block_size=BLOCK,
            kv_cache_bytes=NUM_BLOCKS // cp * model.block_bytes(BLOCK),
            rank_processes=False,
        ) as cluster,
        Client(cluster.endpoint, timeout_s=TIMEOUT_S) as client,
    ):
        worker = cluster.workers[0]
        engine = worker.engine  # type: ignore[attr-defined]
        assert engine.kv.num_bytes * cp == NUM_BLOCKS * model.block_bytes(BLOCK)
        assert worker.stats().num_total_blocks == NUM_BLOCKS // cp
        with client.generate(prompt, Sampling(max_tokens=150, temperature=0.0, ignore_eos=True)) as stream:
            assert any(isinstance(event, Tokens) for event in stream)
            with cluster.held("colocated-0"):
                stats = worker.stats()
                (sequence,) = worker.scheduler.running  # type: ignore[attr-defined]
                num_used = stats.num_total_blocks - stats.num_free_blocks
                # Two steps may be in flight beside what has been computed.
                most = -(-(sequence.num_computed + 2) // (BLOCK * cp))
                assert -(-sequence.num_computed // (BLOCK * cp)) <= num_used <= most
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
