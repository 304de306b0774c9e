"""Clients that stop in the middle: they grant no window, or never send what they began. Frames are written by hand."""

from __future__ import annotations

import asyncio
import gc
import logging

import pytest

from anabranch.protocol.workers import Cancel, Generate
from anabranch_client import Overloaded, Sampling
from anabranch_client.v1 import anabranch_pb2 as pb
from benchmarks.attack.http2 import RST_STREAM, Http2Client

pytestmark = pytest.mark.distributed

GENERATE = "/anabranch.v1.Inference/Generate"
GET_MODEL = "/anabranch.v1.Inference/GetModel"
TOKENIZE = "/anabranch.v1.Inference/Tokenize"
GET_CLUSTER = "/anabranch.v1.Admin/GetCluster"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
LIST_SERVICES = b"\x3a\x00"

PROMPT = pb.GenerateRequest(text="abc", sampling=pb.SamplingParams(max_tokens=500)).SerializeToString()
TEXT = pb.TokenizeRequest(text="abc").SerializeToString()


def call_states() -> int:
    """What grpc.aio holds for calls: one for each, and one or two for those to come."""
    gc.collect()
    return sum(type(thing).__name__ == "RPCState" for thing in gc.get_objects())


@pytest.mark.parametrize("window_bytes", [0, 20, 300])
def test_a_closed_window_ends_the_call_with_a_reset_and_one_line(play, caplog, window_bytes):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        before = call_states()

        def stall() -> Http2Client:
            client = Http2Client(world.orchestrator.grpc_endpoint, window_bytes=window_bytes)
            stream = client.call(GENERATE, PROMPT)
            client.until_ended(stream)
            assert [f.kind for f in client.frames if f.stream_id == stream][-1] == RST_STREAM
            said = b"".join(f.payload for f in client.frames if f.stream_id == stream)
            assert b"client_stall_s: the client read nothing for 0.3 s" in said
            return client

        stalled = asyncio.create_task(asyncio.to_thread(stall))
        request = (await worker.expect(Generate)).request
        await worker.tokens(request, "x" * 400, 0)
        client = await stalled
        assert (await worker.expect(Cancel)).request_id == request.request_id
        await world.quiet()
        # Freed while the connection stays; grpc.aio's server itself holds on to the last calls that came.
        assert call_states() <= before + 3
        assert len([r for r in caplog.records if r.name == "orchestrator.call_guard"]) == 1
        assert not [r for r in caplog.records if r.exc_info or r.levelno >= logging.ERROR]
        # The connection lives, and so does the service.
        with client:
            await asyncio.to_thread(lambda: client.until_ended(client.call(GENERATE, b"\xff")))

    with caplog.at_level(logging.INFO):
        play(scenario, client_stall_s=0.3)


@pytest.mark.parametrize(
    ("path", "body"),
    [(GET_MODEL, b""), (TOKENIZE, TEXT), (GET_CLUSTER, b""), (CHECK, b""), (WATCH, b""), (REFLECT, LIST_SERVICES)],
    ids=lambda value: value.rpartition("/")[2] if isinstance(value, str) else "",
)
def test_no_call_of_any_service_waits_for_a_closed_window(play, caplog, path, body):
    async def scenario(world):
        def stall() -> None:
            with Http2Client(world.orchestrator.grpc_endpoint) as client:
                client.until_ended(client.call(path, body))

        await asyncio.to_thread(stall)

    play(scenario, client_stall_s=0.3)
    assert not [r for r in caplog.records if r.exc_info or r.levelno >= logging.ERROR]


@pytest.mark.parametrize("path", [GENERATE, GET_MODEL, CHECK, WATCH, REFLECT], ids=lambda path: path.rpartition("/")[2])
def test_a_call_whose_request_does_not_come_ends(play, path):
    async def scenario(world):
        def begin() -> None:
            with Http2Client(world.orchestrator.grpc_endpoint) as client:
                stream = client.call(path, None)
                client.until_ended(stream)
                said = b"".join(f.payload for f in client.frames if f.stream_id == stream)
                assert b"client_stall_s: the client sent nothing for 0.3 s" in said

        await asyncio.to_thread(begin)

    play(scenario, client_stall_s=0.3)


@pytest.mark.parametrize("path", [GENERATE, CHECK, REFLECT], ids=lambda path: path.rpartition("/")[2])
def test_a_message_that_is_none_is_the_clients_fault(play, caplog, path):
    async def scenario(world):
        def send() -> None:
            with Http2Client(world.orchestrator.grpc_endpoint) as client:
                stream = client.call(path, b"\xff")
                client.until_ended(stream)
                said = b"".join(f.payload for f in client.frames if f.stream_id == stream)
                assert b"grpc-status\x013" in said
                assert b"invalid_request" in said

        await asyncio.to_thread(send)

    play(scenario)
    assert not [r for r in caplog.records if r.exc_info]


def test_a_watcher_that_does_not_read_holds_up_no_other(play, wait):
    async def scenario(world):
        def watch() -> Http2Client:
            client = Http2Client(world.orchestrator.grpc_endpoint)
            client.call(WATCH, b"")
            client.receive(1.0)
            return client

        with await asyncio.to_thread(watch):
            assert await world.client.health() == "not_serving"
            await world.worker("both-0", "colocated")
            assert await world.client.health() == "serving"

    play(scenario, client_stall_s=30.0)


def test_hundreds_that_stall_leave_a_few_lines_and_nothing_else(play, caplog):
    num_streams = 300

    async def scenario(world):
        await world.worker("both-0", "colocated")
        before = call_states()

        def stall() -> None:
            with Http2Client(world.orchestrator.grpc_endpoint) as client:
                streams = [client.call(GENERATE, PROMPT) for _ in range(num_streams // 2)]
                streams += [client.call(GET_MODEL, b"") for _ in range(num_streams // 2)]
                client.until_ended(*streams)

        await asyncio.to_thread(stall)
        await world.quiet()
        assert call_states() <= before + 3
        # It is the clients' fault, and no worker's.
        (member,) = world.orchestrator.membership.members
        assert member.num_failed == 0

    with caplog.at_level(logging.WARNING):
        play(scenario, client_stall_s=0.5)
    # The log begins a new interval at most every few seconds.
    assert 1 <= len(caplog.records) <= 40
    assert not [r for r in caplog.records if r.exc_info or r.levelno >= logging.ERROR]


def test_calls_at_a_time_are_bounded(play, wait):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        answers = [asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1))) for _ in range(3)]
        requests = [(await worker.expect(Generate)).request for _ in answers]
        with pytest.raises(Overloaded, match="max_calls: 3 calls are under way") as caught:
            await world.client.complete("abc")
        assert caught.value.code == "overloaded"
        for request in requests:
            await worker.tokens(request, "k", 0)
            await worker.ended(request, "length")
        assert [(await answer).text for answer in answers] == ["k"] * 3
        await world.client.model()

    play(scenario, max_calls=3)
