"""What clients and workers may make the orchestrator hold: queued bytes, one request's inbox, what operators see."""

from __future__ import annotations

import asyncio

import pytest

from anabranch.protocol.workers import Cancel, Generate, Preempted, Register, Tokens
from anabranch.request.token import Token
from anabranch_client import Overloaded, Sampling, Unavailable
from orchestrator import inbox

pytestmark = pytest.mark.distributed

# Two bytes of message and 56 of memory for each.
PROMPT = [200] * 1000


def test_queued_requests_are_bounded_in_bytes(play, wait):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        room = world.orchestrator._dispatcher.room
        waiting = [asyncio.create_task(world.client.complete(PROMPT, Sampling(max_tokens=1))) for _ in range(3)]
        await wait(lambda: room.num_places == 3)
        for prompt in (PROMPT, "x" * 1000, [200] * 900):
            with pytest.raises(Overloaded, match="above the 200000 that max_queued_bytes allows") as caught:
                await world.client.complete(prompt)
            assert caught.value.code == "overloaded"
        # Small ones pass, and those that have their first token count no more.
        small = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
        await wait(lambda: room.num_places == 4)
        for _ in range(4):
            request = (await worker.expect(Generate)).request
            await worker.tokens(request, "k", 0)
            await worker.ended(request, "length")
        assert [(await answer).text for answer in (*waiting, small)] == ["k"] * 4
        await world.quiet()
        again = asyncio.create_task(world.client.complete(PROMPT, Sampling(max_tokens=1)))
        request = (await worker.expect(Generate)).request
        await worker.tokens(request, "k", 0)
        await worker.ended(request, "length")
        assert (await again).text == "k"

    play(scenario, max_queued_bytes=200_000, prefill_ahead_tokens=1)


def test_one_request_alone_may_take_more(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        answer = asyncio.create_task(world.client.complete(PROMPT, Sampling(max_tokens=1)))
        request = (await worker.expect(Generate)).request
        await worker.tokens(request, "k", 0)
        await worker.ended(request, "length")
        assert (await answer).text == "k"

    play(scenario, max_queued_bytes=1)


@pytest.mark.parametrize("with_what", ["messages", "tokens of an older epoch"])
def test_a_worker_that_floods_a_request_ends_that_request(play, monkeypatch, with_what):
    monkeypatch.setattr(inbox, "MAX_WAITING", 100)

    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        flooded = asyncio.create_task(world.client.complete("abc"))
        request = (await worker.expect(Generate)).request
        other = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
        spared = (await worker.expect(Generate)).request
        lifecycle = world.orchestrator._dispatcher._requests[request.request_id]
        member = world.orchestrator.membership.by_name("both-0")
        # All at once, as if this process had been held up.
        if with_what == "messages":
            for _ in range(101):
                lifecycle.inbox.said(member, Preempted(request_id=request.request_id, epoch=0))
        else:
            token = Token(request_id=request.request_id, epoch=-1, index=0, token_id=1)
            world.orchestrator._dispatcher.deliver(member, Tokens(tokens=(token,) * 101))
        for _ in range(1000):
            lifecycle.inbox.said(member, Preempted(request_id=request.request_id, epoch=0))
        assert lifecycle.inbox._events.qsize() <= 101
        says = "worker both-0 sends faster than can be taken in: more than 100 tokens and messages"
        with pytest.raises(Unavailable, match=says):
            await flooded
        assert (await worker.expect(Cancel)).request_id == request.request_id
        await worker.tokens(spared, "k", 0)
        await worker.ended(spared, "length")
        assert (await other).text == "k"

    play(scenario, max_recoveries=0)


@pytest.mark.parametrize("change", [{"pid": 2**64 - 1}, {"num_threads": -1}, {"device": "d" * 10_000}])
def test_a_worker_that_could_not_be_shown_is_not_taken_in(play, wait, change):
    async def scenario(world):
        await world.worker("both-0", "colocated")
        odd = world.stranger("odd", "colocated", **change)
        await odd.send(Register(worker=odd.info))
        await wait(lambda: world.orchestrator._control.num_malformed == 1)
        with world.admin() as admin:
            cluster = await asyncio.to_thread(admin.cluster)
        assert [worker.name for worker in cluster.workers] == ["both-0"]

    play(scenario)
