"""Who has another salt learns nothing of a prompt: no block is shared, and no cached token is counted."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest

from anabranch_client import Sampling
from tests.support.in_process import InProcessCluster
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.distributed

KINDS = {"split": ("prefill", "decode"), "colocated": ("colocated",)}
BLOCK = 16
# Two full blocks and 14 tokens.
SECRET = tuple(range(5, 51))


@pytest.mark.parametrize("kind", KINDS)
def test_the_count_speaks_of_ones_own_salt(serve, still_serves, kind: str) -> None:
    cluster, client = serve(*KINDS[kind], block_size=BLOCK)

    sent: dict[str | None, list[int]] = defaultdict(list)

    def cached(prompt: tuple[int, ...], salt: str | None) -> tuple[int, tuple[int, ...]]:
        done = client.complete(prompt, Sampling(max_tokens=4, ignore_eos=True), cache_salt=salt)
        cluster.wait_idle()
        sent[salt].append(0 if done.kv is None else done.kv.bytes)
        return done.usage.num_cached_tokens, done.token_ids

    first, answer = cached(SECRET, "alice")
    assert first == 0
    # Who guesses all of it learns nothing, and gets the same tokens, whatever is cached.
    for salt in ("bob", None, "alice "):
        assert cached(SECRET, salt) == (0, answer)
    # Everybody finds what is their own.
    assert cached((*SECRET[:20], *reversed(SECRET[:26])), "bob")[0] == 16
    for salt in ("alice", "bob", None, "alice "):
        assert cached(SECRET, salt) == (32, answer)
    # How much KV was sent, because the decode worker did not have it, tells nothing either.
    assert len({sizes[0] for sizes in sent.values()}) == 1
    still_serves(cluster, client)


@pytest.mark.parametrize("kind", KINDS)
def test_a_retried_epoch_keeps_its_salt(serve, known, still_serves, kind: str) -> None:
    """Requests that were preempted are computed again, and what they publish then is their salt's too."""
    small = {"kv_cache_bytes": 16 * known.block_bytes(8), "block_size": 8, "preemption": "recompute"}
    cluster, client = serve(*KINDS[kind], block_size=8, by_role={"decode": small, "colocated": small})
    prompts = [known.clear(length, 64) for length in (21, 24, 27, 30)]
    sampling = Sampling(max_tokens=64, ignore_eos=True)
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [pool.submit(client.complete, prompt, sampling, cache_salt="alice") for prompt, _ in prompts]
        assert [one.result(WAIT_S).token_ids for one in answers] == [answer for _, answer in prompts]
    assert cluster.workers[-1].scheduler.num_preempted > 0
    cluster.wait_idle()
    assert salts(cluster) == {"alice"}
    for prompt, answer in prompts:
        guess = (*prompt, *answer[:32])
        done = client.complete(guess, Sampling(max_tokens=4, ignore_eos=True))
        assert (done.usage.num_cached_tokens, done.token_ids) == (0, answer[32:36])
    cluster.wait_idle()
    assert "" in salts(cluster)
    still_serves(cluster, client)


def salts(cluster: InProcessCluster) -> set[str]:
    """Of all that any worker has cached."""
    return {
        entry.salt
        for worker in cluster.workers
        for entry in worker.engine.cache.prefix._by_block.values()  # type: ignore[attr-defined]
    }
