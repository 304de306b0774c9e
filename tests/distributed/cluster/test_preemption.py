"""Requests whose KV is offloaded to host memory are cancelled or fail there: nothing is left, others go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from anabranch.errors import WorkerDied
from anabranch_client import Client, Sampling, Stream, Tokens
from tests.support.in_process import InProcessCluster, wait_until
from tests.support.known import Known, Prompt
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.distributed

KINDS = {"split": ("prefill", "decode"), "colocated": ("colocated",)}
NUM_TOKENS = 64
LENGTHS = (21, 24, 27, 30)


@pytest.fixture(scope="module")
def answers(known: Known) -> dict[Prompt, Prompt]:
    return dict(known.clear(length, NUM_TOKENS) for length in LENGTHS)


@pytest.fixture
def crowded(serve, known: Known) -> Callable[..., tuple[InProcessCluster, Client]]:
    """`crowded(kind)`: a cluster whose pool holds little more than one of `answers`' requests."""

    def start(kind: str, **options: object) -> tuple[InProcessCluster, Client]:
        small = {
            "kv_cache_bytes": 16 * known.block_bytes(8),
            "block_size": 8,
            "offload_bytes": 64 * known.block_bytes(8),
            "preemption": "offload",
        }
        return serve(*KINDS[kind], by_role={"decode": small, "colocated": small}, **options)

    return start


def start_all(client: Client, answers: dict[Prompt, Prompt]) -> list[Stream]:
    sampling = Sampling(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    return [client.generate(prompt, sampling, request_id=f"r{len(prompt)}") for prompt in answers]


def token_ids(stream: Stream) -> Prompt:
    return tuple(token for event in stream if isinstance(event, Tokens) for token in event.token_ids)


@contextmanager
def while_offloaded(cluster: InProcessCluster) -> Iterator[list[str]]:
    """Hold the engine while somebody is offloaded; what their clients call them."""
    worker = cluster.workers[-1]
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        wait_until(lambda: worker.stats().num_offloaded > 0, "somebody who is offloaded")
        with cluster.held(worker.config.name):
            names = cluster.names()
            offloaded = [names[sequence.request.request_id] for sequence in worker.scheduler.offload.sequences]
            if offloaded:
                yield offloaded
                return
    raise AssertionError("whoever was offloaded came back before the engine could be held")


@pytest.mark.parametrize("kind", KINDS)
def test_cancelled_while_offloaded(crowded, answers, still_serves, kind: str) -> None:
    cluster, client = crowded(kind)
    streams = start_all(client, answers)
    names = [f"r{len(prompt)}" for prompt in answers]
    worker = cluster.workers[-1]
    with ThreadPoolExecutor(len(streams)) as pool:
        with while_offloaded(cluster) as offloaded:
            stats = worker.stats()
            assert (stats.num_offloaded, stats.num_total_host_blocks) == (len(offloaded), 64)
            assert stats.num_free_host_blocks < 64
            assert not worker.is_idle()
            for name in offloaded:
                streams[names.index(name)].close()
            wait_until(lambda: not set(offloaded) & set(cluster.names().values()), "the cancels")
        stay = {name: pool.submit(token_ids, streams[names.index(name)]) for name in names if name not in offloaded}
        for name, tokens in stay.items():
            assert tokens.result(WAIT_S) == list(answers.values())[names.index(name)]
    still_serves(cluster, client)


@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_are_offloaded_at_a_worker_that_gives_up_go_on(crowded, answers, still_serves, kind: str) -> None:
    cluster, client = crowded(kind)
    streams = start_all(client, answers)
    worker = cluster.workers[-1]
    with while_offloaded(cluster) as offloaded:
        worker.submit(lambda: worker.abandon(WorkerDied("it gives up")))
        assert offloaded
    # Where they were, at the same worker: there is no other.
    with ThreadPoolExecutor(len(streams)) as pool:
        assert list(pool.map(token_ids, streams)) == list(answers.values())
    still_serves(cluster, client)


@pytest.mark.parametrize("kind", KINDS)
def test_the_orchestrator_knows_of_a_preemption(crowded, answers, still_serves, kind: str) -> None:
    cluster, client = crowded(kind)
    streams = start_all(client, answers)
    worker = cluster.workers[-1]
    with while_offloaded(cluster) as offloaded:
        worker._say_preempted()
        ids = {name: request_id for request_id, name in cluster.names().items()}
        lifecycles = cluster.orchestrator._dispatcher._requests
        wait_until(
            lambda: all(lifecycles[ids[name]].state == "preempted" for name in offloaded), "the news of the preemption"
        )
    with ThreadPoolExecutor(len(streams)) as pool:
        assert list(pool.map(token_ids, streams)) == list(answers.values())
    still_serves(cluster, client)
