"""Where no worker of a role takes requests: new ones are refused at once, queued ones wait for a short while."""

from __future__ import annotations

import asyncio

import pytest

from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import Drain, Generate, Reserve
from anabranch_client import NoWorkers, Sampling, Unavailable

pytestmark = pytest.mark.distributed

NO_PREFILL = "no prefill worker takes requests, nor does a colocated one; start one"
NO_DECODE = "no decode worker takes requests, nor does a colocated one; start one"
NOBODY = "no prefill and no decode worker takes requests, nor does a colocated one; start one"


@pytest.mark.parametrize(
    ("roles", "says"), [((), NOBODY), (("prefill", "prefill"), NO_DECODE), (("decode",), NO_PREFILL)]
)
def test_before_workers_have_come(play, roles, says):
    async def scenario(world):
        for number, role in enumerate(roles):
            await world.worker(f"{role}-{number}", role)
        assert await world.client.health() == "not_serving"
        for prompt in ("abc", [1, 2, 3]):
            with pytest.raises(NoWorkers, match=says) as caught:
                await world.client.complete(prompt)
            assert isinstance(caught.value, Unavailable)
            assert caught.value.code == "no_workers"
        # What needs no worker is answered.
        assert await world.client.tokenize("abc") == (97, 98, 99)
        await world.worker("both-0", "colocated")
        assert await world.client.health() == "serving"

    # Were they queued, this would take an hour.
    play(scenario, queue_timeout_s=3600.0, no_worker_grace_s=3600.0)


def test_a_worker_that_drains_takes_nothing_new(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
        request = (await worker.expect(Generate)).request
        with world.admin() as admin:
            await asyncio.to_thread(admin.drain, "both-0")
        await worker.expect(Drain)
        with pytest.raises(NoWorkers, match=r"nor does a colocated one \(both-0 drains\); start one"):
            await world.client.complete("abc")
        await worker.tokens(request, "k", 0)
        await worker.ended(request, "length")
        assert (await answer).text == "k"

    play(scenario, queue_timeout_s=3600.0)


async def one_runs_one_waits(world, wait):
    """A pair, a request that the decode worker was given, and one in the queue."""
    prefill, decode = await world.pair()
    running = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
    await decode.expect(Reserve)
    waiting = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
    await wait(lambda: len(world.orchestrator._dispatcher.queue) == 1)
    return prefill, decode, running, waiting


def test_a_queued_request_ends_soon_after_the_last_worker_died(play, wait):
    async def scenario(world):
        prefill, decode, running, waiting = await one_runs_one_waits(world, wait)
        await decode.close()
        for answer in (running, waiting):
            with pytest.raises(NoWorkers, match=f"no_worker_grace_s: for 0.2 s {NO_DECODE}"):
                await answer
        # One that was given back later has no grace of its own left.
        assert world.orchestrator._dispatcher.queue._absence.long
        assert prefill.received == []

    play(scenario, queue_timeout_s=3600.0, no_worker_grace_s=0.2, prefill_ahead_tokens=1)


def test_a_worker_that_is_started_again_serves_what_is_queued(play, wait):
    async def scenario(world):
        _, decode, running, waiting = await one_runs_one_waits(world, wait)
        await decode.close()
        await wait(lambda: len(world.orchestrator.membership.members) == 1)
        with pytest.raises(NoWorkers):
            await world.client.complete("abc")
        decode = await world.worker("decode-0", "decode", pid=77)
        for answer, epoch in ((running, 1), (waiting, 0)):
            request = (await decode.expect(Reserve)).request
            assert request.epoch == epoch
            await decode.tokens(request, "k", 0)
            await decode.ended(request, "length")
            assert (await answer).route == ("prefill-0", "decode-0")
        assert not world.orchestrator._dispatcher.queue._absence.long

    play(scenario, queue_timeout_s=3600.0, no_worker_grace_s=3600.0, prefill_ahead_tokens=1)


def test_a_request_that_the_last_worker_gives_back_ends_too(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        answer = asyncio.create_task(world.client.complete("abc"))
        request = (await worker.expect(Generate)).request
        await worker.ended(request, "failed", WireError(code="draining", message="leaving"))
        with pytest.raises(NoWorkers, match=r"no_worker_grace_s: for 0.2 s .*both-0 drains"):
            await answer

    play(scenario, queue_timeout_s=3600.0, no_worker_grace_s=0.2)
