"""Clients that go away, never read, or drop what they hold: workers are told, nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import threading

import grpc
import pytest

from anabranch.protocol.workers import Cancel, Generate, Reserve
from anabranch.request.token import TokenLogprob
from anabranch_client import CallCancelled, Client, DeadlineExceeded, Sampling, Tokens
from anabranch_client.v1 import anabranch_pb2 as pb
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("stage", ["encoding", "queued", "reserving", "prefilling", "decoding", "finishing"])
def test_a_client_cancels_at_each_stage(play, to_prefilling, wait, stage):
    async def scenario(world):
        if stage == "encoding":
            world.model.gate.clear()
        prefill, decode = await world.pair()
        if stage == "queued":
            first = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=2)))
            await decode.expect(Reserve)
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=2)))
        gateway, intake = world.orchestrator._gateway, world.orchestrator._intake
        if stage == "encoding":
            await wait(lambda: intake.num_encoding == 1)
        elif stage == "queued":
            await wait(lambda: len(world.orchestrator._dispatcher.queue) == 1)
        elif stage == "reserving":
            await decode.expect(Reserve)
        else:
            request = await to_prefilling(world, prefill, decode)
        if stage == "decoding":
            await decode.tokens(request, "a", 0)
            await wait(lambda: world.orchestrator._dispatcher._requests[request.request_id].state == "decoding")
        if stage == "finishing":
            await decode.tokens(request, "ab", 0)
            await decode.ended(request, "length")
            await wait(lambda: world.orchestrator._dispatcher._requests[request.request_id].state == "finishing")
        answer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answer
        if stage == "encoding":
            await wait(lambda: gateway.num_calls == 0)
            world.model.gate.set()
        if stage in ("reserving", "prefilling", "decoding"):
            assert (await decode.expect(Cancel)).epoch == 0
        if stage in ("prefilling", "decoding", "finishing"):
            assert (await prefill.expect(Cancel)).epoch == 0
        if stage == "queued":
            await wait(lambda: world.orchestrator.num_requests == 1)
            first.cancel()
            await decode.expect(Cancel)
        await world.quiet()
        assert decode.received == prefill.received == []

    play(scenario, report_timeout_s=5.0, prefill_ahead_tokens=1)


def test_the_clients_own_deadline_cancels(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        answer = asyncio.create_task(world.client.complete("abc", timeout_s=0.3))
        request = (await worker.expect(Generate)).request
        await worker.tokens(request, "a", 0)
        with pytest.raises(DeadlineExceeded) as caught:
            await answer
        assert caught.value.code == "deadline_exceeded"
        await worker.expect(Cancel)

    play(scenario)


@pytest.mark.parametrize("how", ["drop", "close", "leave", "aclose", "adrop"])
def test_a_stream_that_is_not_read_to_its_end_is_cancelled(play, how):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")

        def read_one() -> None:
            with Client(world.orchestrator.grpc_endpoint) as client:
                if how == "leave":
                    with client.generate("abc") as stream:
                        next(stream)
                    left.wait(WAIT_S)
                    return
                stream = client.generate("abc")
                next(stream)
                if how == "close":
                    stream.close()
                    with pytest.raises(CallCancelled):
                        list(stream)
                del stream
                gc.collect()
                left.wait(WAIT_S)

        async def read_one_async() -> None:
            stream = world.client.generate("abc")
            await anext(stream)
            if how == "aclose":
                await stream.aclose()
                with pytest.raises(CallCancelled):
                    [event async for event in stream]
            del stream
            gc.collect()

        left = threading.Event()
        reading = asyncio.create_task(read_one_async() if how.startswith("a") else asyncio.to_thread(read_one))
        request = (await worker.expect(Generate)).request
        # The client lives on: it is the stream's end that cancels.
        assert (await worker.expect(Cancel)).request_id == request.request_id
        left.set()
        await reading

    play(scenario)


def test_a_client_that_never_reads_loses_its_request_and_blocks_nobody(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        # A window that does not grow, so that little fits between server and client.
        options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024), ("grpc.enable_http_proxy", 0))
        async with grpc.aio.insecure_channel(world.orchestrator.grpc_endpoint, options=options) as channel:
            call = channel.unary_stream(
                "/anabranch.v1.Inference/Generate",
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GenerateEvent.FromString,
            )(pb.GenerateRequest(text="abc", sampling=pb.SamplingParams(logprobs=20, max_tokens=1000)))
            request = (await worker.expect(Generate)).request
            logprob = TokenLogprob(logprob=-1.0, top=tuple((n, -float(n)) for n in range(20)))
            await worker.tokens(request, "x" * 1000, 0, logprob)
            # Another client is served meanwhile.
            answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
            other = (await worker.expect(Generate)).request
            await worker.tokens(other, "k", 0)
            await worker.ended(other, "length")
            assert (await answer).text == "k"
            assert (await worker.expect(Cancel)).request_id == request.request_id
            # Gone from everywhere while the client still holds its call.
            await world.quiet()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [event async for event in call]
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "client_stall_s: the client read nothing for 0.5 s" in caught.value.details()

    play(scenario, client_stall_s=0.5)


def test_tokens_kept_for_a_slow_client_are_bounded(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024), ("grpc.enable_http_proxy", 0))
        async with grpc.aio.insecure_channel(world.orchestrator.grpc_endpoint, options=options) as channel:
            call = channel.unary_stream(
                "/anabranch.v1.Inference/Generate",
                request_serializer=pb.GenerateRequest.SerializeToString,
                response_deserializer=pb.GenerateEvent.FromString,
            )(pb.GenerateRequest(text="abc", sampling=pb.SamplingParams(logprobs=20, max_tokens=1000)))
            request = (await worker.expect(Generate)).request
            logprob = TokenLogprob(logprob=-1.0, top=tuple((n, -float(n)) for n in range(20)))
            await worker.tokens(request, "x" * 1000, 0, logprob)
            await worker.expect(Cancel)
            indexes = []

            async def read() -> None:
                async for event in call:
                    first = event.tokens.first_index
                    indexes.extend(range(first, first + len(event.tokens.token_ids)))

            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "max_unread_tokens" in caught.value.details()
            assert indexes == list(range(len(indexes)))
            assert 100 <= len(indexes) < 1000

    play(scenario, client_stall_s=30.0, max_unread_tokens=100)


def test_a_slow_client_gets_everything(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        stream = world.client.generate("abc", Sampling(max_tokens=1000))
        await anext(stream)
        request = (await worker.expect(Generate)).request
        await worker.tokens(request, bytes(33 + n % 90 for n in range(1000)), 0)
        await worker.ended(request, "length")
        await asyncio.sleep(0)
        text = ""
        num_events = 0
        async for event in stream:
            if isinstance(event, Tokens):
                assert event.first_index == len(text)
                text += event.text
                num_events += 1
        assert text == "".join(chr(33 + n % 90) for n in range(1000))
        assert num_events <= 1000

    play(scenario)
