"""Who is let in, in what order, and until when: tenants, priorities, deadlines, retry times, streams of one channel."""

from __future__ import annotations

import asyncio
import time

import grpc.aio
import pytest

from anabranch.errors import DeadlineExceeded as ServerDeadlineExceeded
from anabranch.protocol.workers import Cancel, Generate, Prefill, Reserve
from anabranch.request.sampling_params import SamplingParams
from anabranch_client import DeadlineExceeded, Overloaded, Sampling
from orchestrator.client_deadline import ClientDeadline
from orchestrator.submission import Submission
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.distributed

ONE = Sampling(max_tokens=1)


async def serve_one(worker):
    """Answer the next request with one token; its prompt."""
    request = (await worker.expect(Generate)).request
    await worker.tokens(request, "k", 0)
    await worker.ended(request, "length")
    return bytes(request.prompt_ids).decode()


def submitted(text: str, deadline: ClientDeadline) -> Submission:
    return Submission(prompt=text, sampling=SamplingParams(), deadline=deadline, num_bytes=10)


def test_tenants_take_turns_and_priorities_go_first(play, wait):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        queue = world.orchestrator._dispatcher.queue
        asked = [
            ("running", {}),
            ("flood 1", {"tenant": "flood"}),
            ("flood 2", {"tenant": "flood"}),
            ("flood 3", {"tenant": "flood"}),
            ("small 1", {"tenant": "small"}),
            ("small 2", {"tenant": "small"}),
            ("urgent!", {"tenant": "flood", "priority": -1}),
            ("later..", {"tenant": "small", "priority": 1}),
        ]
        answers = []
        for number, (prompt, terms) in enumerate(asked):
            answers.append(asyncio.create_task(world.client.complete(prompt, ONE, **terms)))
            await wait(lambda number=number: world.orchestrator.num_requests == number + 1)
        assert len(queue) == len(asked) - 1
        order = [await serve_one(worker) for _ in asked]
        # The urgent one is charged to its tenant too.
        assert order == ["running", "urgent!", "small 1", "flood 1", "small 2", "flood 2", "flood 3", "later.."]
        assert [(await answer).text for answer in answers] == ["k"] * len(asked)

    play(scenario, prefill_ahead_tokens=1, priority_step_s=1000.0)


def test_a_client_that_waits_too_short_is_refused_by_the_measured_rate(play, wait):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        queue = world.orchestrator._dispatcher.queue
        answers = [asyncio.create_task(world.client.complete("x" * 100, ONE)) for _ in range(12)]
        await wait(lambda: len(queue) == 11)
        began = time.monotonic()
        # Nothing was measured: nobody is refused for its deadline.
        with pytest.raises(DeadlineExceeded):
            await world.client.complete("abc", ONE, timeout_s=0.05)
        num_served = 0
        while time.monotonic() < began + 0.6 or len(answers) - len(queue) < 4:
            await serve_one(worker)
            num_served += 1
            await asyncio.sleep(0.2)
        with pytest.raises(Overloaded, match="deadline: by the rate at which prompts were given to workers") as caught:
            await world.client.complete("abc", ONE, timeout_s=0.5)
        assert 0.1 <= caught.value.retry_after_s <= 60.0
        assert len(queue) > 0
        # One that goes before all others makes it.
        urgent = asyncio.create_task(world.client.complete("abc", ONE, priority=-1, timeout_s=20.0))
        for _ in range(len(answers) + 1 - num_served):
            await serve_one(worker)
        assert (await urgent).text == "k"
        await asyncio.gather(*answers)

    play(scenario, prefill_ahead_tokens=1, priority_step_s=1000.0, queue_timeout_s=60.0)


@pytest.mark.parametrize("stage", ["queued", "reserving", "prefilling", "decoding"])
def test_expired_work_is_not_begun(play, wait, stage):
    async def scenario(world):
        prefill, decode = await world.pair()
        intake = world.orchestrator._intake
        first = None
        if stage == "queued":
            first = asyncio.create_task(world.client.complete("abc", ONE))
            await decode.expect(Reserve)
            await wait(lambda: world.orchestrator._dispatcher.num_requests == 1)
        deadline = ClientDeadline(60.0)
        generation = await intake.accept(submitted("abc", deadline))
        request = None
        if stage != "queued":
            request = (await decode.expect(Reserve)).request
        if stage in ("prefilling", "decoding"):
            await decode.reserved(request)
            await prefill.expect(Prefill)
        if stage == "decoding":
            await decode.tokens(request, "k", 0)
            assert (await generation.next()).text == "k"
        # As if the time had passed, whether or not the timer was quick enough to say so.
        deadline._at_s = time.monotonic()
        if stage == "reserving":
            await decode.reserved(request)
        else:
            deadline._expire(generation._lifecycle.inbox.stop)
        with pytest.raises(ServerDeadlineExceeded, match="deadline: the 60 s that the client gave are over"):
            await generation.next()
        if stage != "queued":
            assert (await decode.expect(Cancel)).request_id == request.request_id
        if stage in ("prefilling", "decoding"):
            assert (await prefill.expect(Cancel)).request_id == request.request_id
        if first is not None:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            await decode.expect(Cancel)
        # No order to compute the prompt of what was over.
        assert not prefill.received

    play(scenario, prefill_ahead_tokens=1)


def test_a_deadline_that_is_over_is_named(play):
    async def scenario(world):
        await world.worker("both-0", "colocated")
        with pytest.raises(ServerDeadlineExceeded, match="deadline: the 0 s that the client gave are over"):
            await world.orchestrator._intake.accept(submitted("abc", ClientDeadline(0.0)))
        # What is being encoded ends with it, too.
        world.model.gate.clear()
        with pytest.raises(ServerDeadlineExceeded, match=r"deadline: the 0.05 s that the client gave are over"):
            await world.orchestrator._intake.accept(submitted("abc", ClientDeadline(0.05)))

    play(scenario)


def test_a_tenant_cannot_fill_the_room_for_all(play, wait):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        room = world.orchestrator._dispatcher.room
        flood = [asyncio.create_task(world.client.complete("abc", ONE, tenant="flood")) for _ in range(4)]
        await wait(lambda: room.num_places == 4)
        with pytest.raises(Overloaded, match="4 requests wait for their first token") as caught:
            await world.client.complete("abc", ONE, tenant="small")
        assert caught.value.retry_after_s == 1.0  # nothing was measured
        await serve_one(worker)
        await wait(lambda: room.num_places == 3)
        with pytest.raises(Overloaded, match="the tenant 'flood' has 3 requests waiting for their first token; 1 more"):
            await world.client.complete("abc", ONE, tenant="flood")
        small = asyncio.create_task(world.client.complete("abc", ONE, tenant="small"))
        for _ in range(4):
            await serve_one(worker)
        await asyncio.gather(*flood, small)

    play(scenario, max_queued=4, prefill_ahead_tokens=1)


def test_prompt_tokens_of_those_who_wait_are_bounded(play, wait):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        room = world.orchestrator._dispatcher.room
        waiting = [asyncio.create_task(world.client.complete("x" * 100, ONE)) for _ in range(3)]
        await wait(lambda: room.num_tokens == 300)
        for prompt in ("x" * 51, [7] * 51):
            with pytest.raises(
                Overloaded, match="have 300 prompt tokens and this one 51 more, above the 350"
            ) as caught:
                await world.client.complete(prompt, ONE)
            assert caught.value.retry_after_s is not None
        waiting.append(asyncio.create_task(world.client.complete("x" * 50, ONE)))
        for _ in range(4):
            await serve_one(worker)
        await asyncio.gather(*waiting)

    play(scenario, max_queued_tokens=350, prefill_ahead_tokens=1)


def test_calls_beyond_the_most_are_refused_on_one_channel_too(play):
    """A client's gRPC must not let them wait in silence for others to end, whatever the queue holds."""

    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        streams, requests = [], []
        for _ in range(10):
            stream = world.client.generate("abc", Sampling(max_tokens=2))
            streams.append(stream)
            async with asyncio.timeout(WAIT_S):
                await anext(stream)
                requests.append((await worker.expect(Generate)).request)
                await worker.tokens(requests[-1], "k", 0)
                assert (await anext(stream)).text == "k"
        for outcome in await asyncio.gather(
            *(world.client.complete("abc", ONE) for _ in range(200)), return_exceptions=True
        ):
            assert isinstance(outcome, Overloaded), outcome
            assert str(outcome).startswith("max_calls: 10 calls are under way")
            assert outcome.retry_after_s is not None
        for stream, request in zip(streams, requests, strict=True):
            await worker.tokens(request, "l", 1)
            await worker.ended(request, "length")
            last, _ = [event async for event in stream]
            assert last.text == "l"

    play(scenario, max_calls=10, max_queued=2, token_timeout_s=60.0)


def test_the_trailer_says_when_to_try_again(play, wait):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        first = asyncio.create_task(world.client.complete("abc", ONE))
        await wait(lambda: world.orchestrator._dispatcher.num_requests == 1)
        async with grpc.aio.insecure_channel(world.orchestrator.grpc_endpoint) as channel:
            call = channel.unary_stream("/anabranch.v1.Inference/Generate")(b"\x12\x01x", timeout=10.0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
        trailers = dict(caught.value.trailing_metadata())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert trailers["anabranch-code"] == "overloaded"
        assert trailers["anabranch-retry-after-s"] == "1.000"
        await serve_one(worker)
        await first

    play(scenario, max_queued=1)
