"""The control channel: delivery, identities, and what it does with garbage."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError, FrameTooLarge, MalformedMessage, Overloaded, PeerLost
from anabranch.protocol.workers import Beat, Cancel, Drain, ToOrchestrator, ToWorker, WorkerStats
from tests.support.resources import num_descriptors
from tests.support.waiting import eventually_async
from transport.control import ControlClient, ControlServer
from transport.control import socket as control_socket
from transport.control.codec import Codec

pytestmark = pytest.mark.unit

WAIT_S = 10.0


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


def open_pair(bind: str = "tcp://127.0.0.1:*", name: bytes | None = b"decode-0") -> tuple[ControlServer, ControlClient]:
    server = ControlServer(bind, ToOrchestrator)
    return server, ControlClient(server.endpoint, ToWorker, identity=name)


@pytest.mark.parametrize("scheme", ["tcp", "tcp-zero", "ipc"])
def test_messages_go_both_ways_with_the_peers_identity(scheme: str, tmp_path: Path) -> None:
    bind = {"tcp": "tcp://127.0.0.1:*", "tcp-zero": "tcp://127.0.0.1:0", "ipc": f"ipc://{tmp_path}/control"}[scheme]

    async def scenario() -> None:
        server, client = open_pair(bind)
        stats = WorkerStats(
            num_free_blocks=3, num_total_blocks=4, num_running=1, num_waiting=2, num_leases=0, queued_tokens=7
        )
        await client.send(Beat(stats=stats))
        peer, message = await server.recv()
        assert (peer, message) == (b"decode-0", Beat(stats=stats))
        await server.send(peer, Cancel(request_id="r", epoch=2))
        assert await client.recv() == Cancel(request_id="r", epoch=2)
        client.close()
        server.close()

    run(scenario)


def test_messages_of_one_peer_arrive_in_order() -> None:
    async def scenario() -> None:
        server, client = open_pair()
        await client.send(Beat())
        peer, _ = await server.recv()
        for epoch in range(500):
            await server.send(peer, Cancel(request_id="r", epoch=epoch))
        received = [await client.recv() for _ in range(500)]
        assert received == [Cancel(request_id="r", epoch=epoch) for epoch in range(500)]
        client.close()
        server.close()

    run(scenario)


def test_sending_to_a_stranger_or_a_peer_that_left_raises_peer_lost() -> None:
    async def scenario() -> None:
        server, client = open_pair()
        with pytest.raises(PeerLost):
            await server.send(b"nobody", Drain())
        await client.send(Beat())
        peer, _ = await server.recv()
        client.close()

        async def lost() -> bool:
            try:
                await server.send(peer, Drain())
            except PeerLost:
                return True
            return False

        for _ in range(1000):
            if await lost():
                break
            await asyncio.sleep(0.005)
        else:
            pytest.fail("the peer that left can still be sent to")
        server.close()
        with pytest.raises(PeerLost, match="closed"):
            await server.send(peer, Drain())

    run(scenario)


def test_a_worker_that_comes_back_under_its_name_is_heard_and_reached() -> None:
    async def scenario() -> None:
        server, first = open_pair()
        await first.send(Beat())
        await server.recv()
        second = ControlClient(server.endpoint, ToWorker, identity=b"decode-0")
        await second.send(Beat())
        peer, _ = await server.recv()
        await server.send(peer, Drain())
        assert await second.recv() == Drain()
        for end in (first, second, server):
            end.close()

    run(scenario)


def test_a_queue_that_is_full_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_socket, "HIGH_WATER_MARK", 5)

    async def scenario() -> None:
        client = ControlClient("tcp://127.0.0.1:9", ToWorker, identity=None)  # nobody listens there
        for _ in range(5):
            await client.send(Beat())
        with pytest.raises(Overloaded):
            await client.send(Beat())
        client.close()

    run(scenario)


def test_too_large_a_message_is_refused_before_it_is_sent() -> None:
    async def scenario() -> None:
        server = ControlServer("tcp://127.0.0.1:*", ToOrchestrator, max_message_bytes=1000)
        client = ControlClient(server.endpoint, ToWorker, identity=None, max_message_bytes=1000)
        with pytest.raises(FrameTooLarge, match="1000"):
            await client.send(Cancel(request_id="r" * 2000, epoch=0))
        client.close()
        server.close()

    run(scenario)


class Stranger:
    """A raw DEALER beside a real client: what it sends must not disturb the client."""

    def __init__(self, server: ControlServer) -> None:
        self._context = zmq.asyncio.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(server.endpoint)

    def close(self) -> None:
        self.socket.close()
        self._context.term()


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


GARBAGE = {
    "empty": [b""],
    "not msgpack": [b"\xc1\xc1\xc1"],
    "truncated": [msgspec.msgpack.encode(Beat())[:-1]],
    "trailing": [msgspec.msgpack.encode(Beat()) + b"\0"],
    "unknown type": [msgspec.msgpack.encode({"type": "nonsense"})],
    "the other direction's type": [msgspec.msgpack.encode(Drain())],
    "no type": [msgspec.msgpack.encode({"stats": None})],
    "unknown field": [msgspec.msgpack.encode({"type": "beat", "surprise": 1})],
    "wrong field type": [msgspec.msgpack.encode({"type": "beat", "stats": 7})],
    "huge array claimed": [b"\xdd\xff\xff\xff\xff"],
    "huge string claimed": [b"\xdb\xff\xff\xff\xff"],
    "deeply nested": [nested(100_000)],
    "bad utf-8": [b"\x81\xa4type\xa4\xff\xff\xff\xff"],
    "two frames": [msgspec.msgpack.encode(Beat()), msgspec.msgpack.encode(Beat())],
    "many frames": [b"x"] * 1000,
    "pickle": [b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07message\x94."],
}


@pytest.mark.parametrize("frames", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_counted_and_the_channel_goes_on(frames: list[bytes]) -> None:
    async def scenario() -> None:
        server, client = open_pair()
        stranger = Stranger(server)
        receiving = asyncio.create_task(server.recv())
        await stranger.socket.send_multipart(frames)
        await eventually_async(lambda: server.num_malformed == 1)
        assert not receiving.done()
        await client.send(Beat())
        assert await receiving == (b"decode-0", Beat())
        stranger.close()
        client.close()
        server.close()

    run(scenario)


def test_an_oversized_frame_never_arrives_and_others_do() -> None:
    async def scenario() -> None:
        server = ControlServer("tcp://127.0.0.1:*", ToOrchestrator, max_message_bytes=1000)
        client = ControlClient(server.endpoint, ToWorker, identity=b"c")
        stranger = Stranger(server)
        receiving = asyncio.create_task(server.recv())
        await stranger.socket.send(b"x" * 1001)
        await eventually_async(lambda: server.num_malformed == 1)
        await stranger.socket.send(b"x" * 1_000_000)
        await client.send(Beat())
        assert await receiving == (b"c", Beat())
        for end in (stranger, client, server):
            end.close()

    run(scenario)


def test_bytes_that_are_not_even_zeromq_leave_the_channel_alone() -> None:
    async def scenario() -> None:
        server, client = open_pair()
        host, port = server.endpoint.removeprefix("tcp://").split(":")
        for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"\xff" * 10):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(data)
            await writer.drain()
            writer.close()
        await client.send(Beat())
        assert await server.recv() == (b"decode-0", Beat())
        client.close()
        server.close()

    run(scenario)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(st.binary(max_size=200), min_size=1, max_size=3), min_size=1, max_size=5))
def test_no_bytes_at_all_make_recv_raise(messages: list[list[bytes]]) -> None:
    async def scenario() -> None:
        server, client = open_pair()
        stranger = Stranger(server)
        receiving = asyncio.create_task(server.recv())
        for frames in messages:
            await stranger.socket.send_multipart(frames)
        await eventually_async(lambda: server.num_malformed == len(messages))
        await client.send(Beat())
        assert await receiving == (b"decode-0", Beat())
        stranger.close()
        client.close()
        server.close()

    run(scenario)


@given(st.binary(max_size=300))
def test_any_bytes_decode_or_are_refused_by_name(data: bytes) -> None:
    codec = Codec(ToWorker, 1000)
    try:
        message = codec.decode(data)
    except (MalformedMessage, FrameTooLarge):
        pass
    else:
        assert codec.decode(codec.encode(message)) == message


@pytest.mark.parametrize(
    "bind", ["tcp://*:0", "tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.1:5555", "tcp://eth0:0"]
)
def test_binding_beyond_this_machine_must_be_said_by_name(bind: str) -> None:
    with pytest.raises(ConfigError, match="allow_remote"):
        ControlServer(bind, ToOrchestrator)


def test_binding_beyond_this_machine_works_when_it_was_said() -> None:
    async def scenario() -> None:
        server = ControlServer("tcp://0.0.0.0:0", ToOrchestrator, allow_remote=True)
        assert server.endpoint.startswith("tcp://0.0.0.0:")
        server.close()

    run(scenario)


@pytest.mark.parametrize("bind", ["", "nonsense", "udp://127.0.0.1:1", "tcp://127.0.0.1", "tcp://127.0.0.1:99999"])
def test_what_is_not_an_endpoint_is_refused(bind: str) -> None:
    with pytest.raises(ConfigError, match="bind"):
        ControlServer(bind, ToOrchestrator)


@pytest.mark.parametrize("identity", [b"", b"\0abc", b"x" * 256])
def test_what_is_not_an_identity_is_refused(identity: bytes) -> None:
    with pytest.raises(ConfigError, match="identity"):
        ControlClient("tcp://127.0.0.1:9", ToWorker, identity=identity)


def test_close_ends_a_waiting_recv_and_returns_every_descriptor() -> None:
    async def scenario() -> None:
        before = num_descriptors()
        server, client = open_pair()
        await client.send(Beat())
        await server.recv()
        receiving = asyncio.create_task(server.recv())
        await asyncio.sleep(0)
        server.close()
        with pytest.raises(PeerLost):
            await receiving
        client.close()
        client.close()
        await eventually_async(lambda: num_descriptors() <= before)

    run(scenario)
