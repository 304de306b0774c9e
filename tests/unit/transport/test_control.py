"""The control channel: delivery, peers, what it does with garbage, and that no peer can hold it up."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError, FrameTooLarge, MalformedMessage, Overloaded, PeerLost, TransportUnavailable
from anabranch.protocol.workers import Beat, Cancel, Drain, ToOrchestrator, ToWorker, WorkerStats
from tests.support.control import SECRET, dial, proven
from tests.support.resources import num_descriptors
from tests.support.waiting import WAIT_S, eventually_async
from transport.control import ControlClient, ControlServer
from transport.control import client as control_client
from transport.control import frames as control_frames
from transport.control import server as control_server
from transport.control.codec import Codec
from transport.control.frames import MAX_WAITING_FRAMES, frame
from transport.control.server import MAX_MALFORMED

pytestmark = pytest.mark.unit

BEAT = msgspec.msgpack.encode(Beat())


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), WAIT_S))


async def open_server(bind: str = "tcp://127.0.0.1:0", max_message_bytes: int = 8 << 20) -> ControlServer:
    server = ControlServer(bind, ToOrchestrator, secret=SECRET, max_message_bytes=max_message_bytes)
    await server.start()
    return server


def open_client(server: ControlServer, name: str = "decode-0") -> ControlClient:
    return ControlClient(server.endpoint, ToWorker, secret=SECRET, name=name)


async def open_pair(bind: str = "tcp://127.0.0.1:0") -> tuple[ControlServer, ControlClient]:
    server = await open_server(bind)
    return server, open_client(server)


async def close(*ends: ControlServer | ControlClient) -> None:
    await asyncio.gather(*(end.close() for end in ends))


@pytest.mark.parametrize("scheme", ["tcp", "tcp6", "ipc"])
def test_messages_go_both_ways(scheme: str, tmp_path: Path) -> None:
    bind = {"tcp": "tcp://127.0.0.1:0", "tcp6": "tcp://[::1]:0", "ipc": f"ipc://{tmp_path}/control"}[scheme]

    async def scenario() -> None:
        server, client = await open_pair(bind)
        stats = WorkerStats(
            num_free_blocks=3, num_total_blocks=4, num_running=1, num_waiting=2, num_leases=0, queued_tokens=7
        )
        await client.send(Beat(stats=stats))
        peer, message = await server.recv()
        assert message == Beat(stats=stats)
        assert peer.endswith(b":decode-0")
        await server.send(peer, Cancel(request_id="r", epoch=2))
        assert await client.recv() == Cancel(request_id="r", epoch=2)
        await close(client, server)

    run(scenario)


def test_messages_of_one_peer_arrive_in_order() -> None:
    async def scenario() -> None:
        server, client = await open_pair()
        await client.send(Beat())
        peer, _ = await server.recv()
        sent = [Cancel(request_id="r", epoch=epoch) for epoch in range(2 * MAX_WAITING_FRAMES)]
        for message in sent:
            await server.send(peer, message)
        assert [await client.recv() for _ in sent] == sent
        await close(client, server)

    run(scenario)


def test_what_was_sent_before_the_server_is_there_arrives(tmp_path: Path) -> None:
    async def scenario() -> None:
        bind = f"ipc://{tmp_path}/control"
        client = ControlClient(bind, ToWorker, secret=SECRET)
        for _ in range(3):
            await client.send(Beat())
        server = await open_server(bind)
        peers = {(await server.recv())[0] for _ in range(3)}
        assert len(peers) == 1
        await close(client, server)

    run(scenario)


def test_sending_to_a_stranger_or_a_peer_that_left_raises_peer_lost() -> None:
    async def scenario() -> None:
        server, client = await open_pair()
        with pytest.raises(PeerLost):
            await server.send(b"nobody", Drain())
        await client.send(Beat())
        peer, _ = await server.recv()
        await client.close()

        async def lost() -> bool:
            try:
                await server.send(peer, Drain())
            except PeerLost:
                return True
            return False

        await eventually_async(lost)
        await server.close()
        with pytest.raises(PeerLost, match="closed"):
            await server.send(peer, Drain())
        with pytest.raises(PeerLost, match="closed"):
            await client.send(Beat())

    run(scenario)


def test_a_peer_that_left_is_heard_to_its_last_message() -> None:
    async def scenario() -> None:
        server, client = await open_pair()
        await client.send(Beat())
        first, _ = await server.recv()
        for _ in range(19):
            await client.send(Beat())
        await client.close()
        await asyncio.sleep(0.05)
        await server.send(first, Drain())  # it counts as there until it has been heard out
        assert [(await server.recv())[0] for _ in range(19)] == [first] * 19
        await server.close()

    run(scenario)


def test_nobody_takes_over_a_peer_by_its_name() -> None:
    async def scenario() -> None:
        server, first = await open_pair()
        second = open_client(server)
        await first.send(Beat())
        one, _ = await server.recv()
        await second.send(Beat())
        other, _ = await server.recv()
        assert one != other
        await server.send(one, Cancel(request_id="first", epoch=0))
        await server.send(other, Cancel(request_id="second", epoch=0))
        assert await first.recv() == Cancel(request_id="first", epoch=0)
        assert await second.recv() == Cancel(request_id="second", epoch=0)
        await close(first, second, server)

    run(scenario)


def test_a_connection_that_breaks_is_made_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        server, client = await open_pair(f"ipc://{tmp_path}/control")
        await client.send(Beat())
        await server.recv()
        await server.close()
        server = await open_server(f"ipc://{tmp_path}/control")

        async def heard() -> bool:
            await client.send(Beat())
            try:
                async with asyncio.timeout(0.05):
                    peer, _ = await server.recv()
            except TimeoutError:
                return False
            await server.send(peer, Drain())
            return True

        await eventually_async(heard)
        assert await client.recv() == Drain()
        await close(client, server)

    run(scenario)


def test_a_queue_that_is_full_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(control_client, "MAX_QUEUED_MESSAGES", 5)

    async def scenario() -> None:
        client = ControlClient(f"ipc://{tmp_path}/nobody", ToWorker)
        for _ in range(5):
            await client.send(Beat())
        with pytest.raises(Overloaded):
            await client.send(Beat())
        await client.close()

    run(scenario)


def test_a_peer_that_does_not_read_is_overloaded_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_frames, "MAX_UNSENT_BYTES", 1 << 20)

    async def scenario() -> None:
        server, client = await open_pair()
        _, writer = await proven(server.endpoint)
        writer.write(frame(BEAT))
        deaf, _ = await server.recv()

        async def talk() -> None:
            for _ in range(1000):
                await server.send(deaf, Cancel(request_id="r" * 60_000, epoch=0))
                await asyncio.sleep(0)

        with pytest.raises(Overloaded, match="wait to be read"):
            await talk()
        await client.send(Beat())
        peer, _ = await server.recv()
        await server.send(peer, Drain())
        assert await client.recv() == Drain()
        writer.transport.abort()
        await close(client, server)

    run(scenario)


def test_too_large_a_message_is_refused_before_it_is_sent() -> None:
    async def scenario() -> None:
        server = await open_server(max_message_bytes=1000)
        client = ControlClient(server.endpoint, ToWorker, secret=SECRET, max_message_bytes=1000)
        with pytest.raises(FrameTooLarge, match="1000"):
            await client.send(Cancel(request_id="r" * 2000, epoch=0))
        await close(client, server)

    run(scenario)


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\xc0"


GARBAGE = {
    "empty": b"",
    "not msgpack": b"\xc1\xc1\xc1",
    "truncated": BEAT[:-1],
    "trailing": BEAT + b"\0",
    "unknown type": msgspec.msgpack.encode({"type": "nonsense"}),
    "the other direction's type": msgspec.msgpack.encode(Drain()),
    "no type": msgspec.msgpack.encode({"stats": None}),
    "unknown field": msgspec.msgpack.encode({"type": "beat", "surprise": 1}),
    "wrong field type": msgspec.msgpack.encode({"type": "beat", "stats": 7}),
    "huge array claimed": b"\xdd\xff\xff\xff\xff",
    "huge string claimed": b"\xdb\xff\xff\xff\xff",
    "deeply nested": nested(100_000),
    "bad utf-8": b"\x81\xa4type\xa4\xff\xff\xff\xff",
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07message\x94.",
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_counted_and_the_channel_goes_on(data: bytes) -> None:
    async def scenario() -> None:
        server, client = await open_pair()
        _, writer = await proven(server.endpoint)
        receiving = asyncio.create_task(server.recv())
        writer.write(frame(data))
        await eventually_async(lambda: server.num_malformed == 1)
        assert not receiving.done()
        await client.send(Beat())
        peer, _ = await receiving
        assert peer.endswith(b":decode-0")
        writer.write(frame(BEAT))  # its connection goes on as well
        assert (await server.recv())[0] != peer
        writer.transport.abort()
        await close(client, server)

    run(scenario)


@pytest.mark.parametrize("num_bytes", [1001, 1_000_000, 2**32 - 1])
def test_a_frame_that_is_too_large_ends_its_connection_alone(num_bytes: int) -> None:
    async def scenario() -> None:
        server = await open_server(max_message_bytes=1000)
        client = open_client(server)
        reader, writer = await proven(server.endpoint)
        writer.write(num_bytes.to_bytes(4, "big") + b"x" * 1001)
        receiving = asyncio.create_task(server.recv())
        await eventually_async(lambda: server.num_malformed == 1)
        assert await ended(reader)
        await client.send(Beat())
        assert (await receiving)[1] == Beat()
        writer.transport.abort()
        await close(client, server)

    run(scenario)


def test_a_peer_that_sends_nothing_but_garbage_is_ended() -> None:
    async def scenario() -> None:
        server, client = await open_pair()
        reader, writer = await proven(server.endpoint)
        for _ in range(MAX_MALFORMED + 50):
            writer.write(frame(b"\xc1"))
        receiving = asyncio.create_task(server.recv())
        assert await ended(reader)
        assert server.num_malformed == MAX_MALFORMED + 1
        await client.send(Beat())
        assert (await receiving)[1] == Beat()
        writer.transport.abort()
        await close(client, server)

    run(scenario)


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the other end hangs up."""
    async with asyncio.timeout(WAIT_S):
        try:
            while await reader.read(4096):
                pass
        except ConnectionError:
            pass
    return True


def test_one_peer_that_floods_does_not_keep_another_waiting() -> None:
    async def scenario() -> None:
        server, client = await open_pair()
        _, writer = await proven(server.endpoint)
        await client.send(Beat())
        quiet, _ = await server.recv()
        writer.write(frame(BEAT) * 100_000)
        flooder, _ = await server.recv()
        assert flooder != quiet
        await eventually_async(lambda: len(server._peers[flooder].backlog) == MAX_WAITING_FRAMES)
        await client.send(Beat())
        await eventually_async(lambda: len(server._peers[quiet].backlog) == 1)
        assert quiet in [(await server.recv())[0] for _ in range(2)]
        # What it may have waiting is bounded; the rest waits in its own process.
        assert len(server._peers[flooder].backlog) <= MAX_WAITING_FRAMES
        writer.transport.abort()
        await close(client, server)

    run(scenario)


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
@pytest.mark.parametrize("data", [frame(BEAT) * 2_000, frame(b"\xc1" * 7) * 2_000, frame(BEAT + bytes(1 << 20)) * 3])
def test_floods_with_disconnects_leave_it_serving(scheme: str, data: bytes, tmp_path: Path) -> None:
    """What aborted the process inside libzmq: peers that send as fast as they can to a slow reader, and are gone."""

    async def flood(server: ControlServer) -> None:
        connections = [await proven(server.endpoint) for _ in range(8)]
        for _, writer in connections:
            writer.write(data)
        await asyncio.sleep(0.02)
        for _, writer in connections:
            writer.transport.abort()

    async def scenario() -> None:
        descriptors = num_descriptors()
        server, client = await open_pair("tcp://127.0.0.1:0" if scheme == "tcp" else f"ipc://{tmp_path}/control")
        for _ in range(4):
            flooding = asyncio.create_task(flood(server))
            await client.send(Beat())
            while not (await server.recv())[0].endswith(b":decode-0"):
                await asyncio.sleep(0.0001)
            await flooding
        # Everything that was said is heard, or its sender is gone; then only the client is left.
        reading = asyncio.create_task(drained(server))
        await eventually_async(lambda: len(server._peers) == 1)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await client.send(Beat())
        peer, _ = await server.recv()
        await server.send(peer, Drain())
        assert await client.recv() == Drain()
        await close(client, server)
        await eventually_async(lambda: num_descriptors() <= descriptors)

    run(scenario)


async def drained(server: ControlServer) -> None:
    while True:
        await server.recv()


def test_peers_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "MAX_PEERS", 2)

    async def scenario() -> None:
        server, client = await open_pair()
        await client.send(Beat())
        await server.recv()
        _, writer = await proven(server.endpoint)
        with pytest.raises(PeerLost):
            await proven(server.endpoint)
        assert server.num_refused == 1
        late = open_client(server, "late")
        await late.send(Beat())
        writer.transport.abort()  # makes room
        assert (await server.recv())[0].endswith(b":late")
        await close(client, late, server)

    run(scenario)


def test_a_dismissed_peer_reads_its_last_message_and_is_not_heard_again() -> None:
    async def scenario() -> None:
        server = await open_server()
        reader, writer = await proven(server.endpoint)
        writer.write(frame(BEAT) * 50)
        peer, _ = await server.recv()
        await server.dismiss(peer, Drain())
        receiving = asyncio.create_task(server.recv())
        writer.write(frame(BEAT) * 50)
        got = await asyncio.wait_for(reader.read(), WAIT_S)
        assert got == frame(msgspec.msgpack.encode(Drain()))
        assert not receiving.done()
        with pytest.raises(PeerLost):
            await server.send(peer, Drain())
        writer.transport.abort()
        await eventually_async(lambda: not server._peers)
        assert not receiving.done()
        await server.close()
        with pytest.raises(PeerLost):
            await receiving

    run(scenario)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(max_size=200), min_size=1, max_size=8))
def test_no_bytes_at_all_make_recv_raise(messages: list[bytes]) -> None:
    async def scenario() -> None:
        server, client = await open_pair()
        _, writer = await proven(server.endpoint)
        receiving = asyncio.create_task(server.recv())
        for data in messages:
            writer.write(frame(data))
        await eventually_async(lambda: server.num_malformed == len(messages))
        await client.send(Beat())
        assert (await receiving)[0].endswith(b":decode-0")
        writer.transport.abort()
        await close(client, server)

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


@pytest.mark.parametrize("bind", ["tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.1:5555", "tcp://eth0:0"])
def test_binding_beyond_this_machine_must_be_said_by_name(bind: str) -> None:
    with pytest.raises(ConfigError, match="allow_remote"):
        ControlServer(bind, ToOrchestrator, secret=SECRET)


def test_binding_beyond_this_machine_works_when_it_was_said() -> None:
    async def scenario() -> None:
        server = ControlServer("tcp://0.0.0.0:0", ToOrchestrator, secret=SECRET, allow_remote=True)
        assert server.endpoint.startswith("tcp://0.0.0.0:")
        await server.close()

    run(scenario)


@pytest.mark.parametrize(
    "bind",
    [
        "",
        "nonsense",
        "udp://127.0.0.1:1",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:99999",
        "tcp://:5",
        "ipc://",
        "ipc://a\0",
        "tcp://a..b:5000",
        f"tcp://{'a' * 64}:5000",
    ],
)
def test_what_is_not_an_endpoint_is_refused(bind: str) -> None:
    with pytest.raises(ConfigError, match="control_bind"):
        ControlServer(bind, ToOrchestrator, secret=SECRET)


@pytest.mark.parametrize(
    ("path", "says"), [("absent/control", "cannot be bound|can be bound"), ("x" * 200, "shorter path")]
)
def test_a_socket_that_cannot_be_is_refused_by_name(path: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        ControlServer(f"ipc://{tmp_path}/{path}", ToOrchestrator)


def test_a_unix_socket_is_open_to_its_user_alone_and_goes_with_its_server(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)

    async def scenario() -> None:
        before = os.umask(0)
        try:
            server = await open_server(f"ipc://{tmp_path}/control")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "control").stat().st_mode) == 0o600
        await server.close()
        assert not (tmp_path / "control").exists()

    run(scenario)


def test_a_socket_left_behind_is_replaced_and_one_that_lives_is_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "control"))
        server, client = await open_pair(f"ipc://{tmp_path}/control")
        with pytest.raises(TransportUnavailable, match="cannot bind"):
            ControlServer(f"ipc://{tmp_path}/control", ToOrchestrator)
        (tmp_path / "file").write_text("kept")
        with pytest.raises(TransportUnavailable, match="cannot bind"):
            ControlServer(f"ipc://{tmp_path}/file", ToOrchestrator)
        assert (tmp_path / "file").read_text() == "kept"
        await client.send(Beat())
        assert (await server.recv())[1] == Beat()
        await close(client, server)

    run(scenario)


def test_a_port_that_is_taken_is_named() -> None:
    async def scenario() -> None:
        server = await open_server()
        with pytest.raises(TransportUnavailable, match=server.endpoint):
            ControlServer(server.endpoint, ToOrchestrator, secret=SECRET)
        await server.close()

    run(scenario)


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_close_ends_a_waiting_recv_and_returns_every_descriptor(scheme: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        before = num_descriptors()
        server, client = await open_pair("tcp://127.0.0.1:0" if scheme == "tcp" else f"ipc://{tmp_path}/control")
        await client.send(Beat())
        await server.recv()
        stranger = await dial(server.endpoint)
        receiving = asyncio.create_task(server.recv())
        waiting = asyncio.create_task(client.recv())
        await asyncio.sleep(0)
        await server.close()
        with pytest.raises(PeerLost):
            await receiving
        await client.close()
        with pytest.raises(PeerLost):
            await waiting
        await client.close()
        await server.close()
        stranger[1].transport.abort()
        await eventually_async(lambda: num_descriptors() <= before)

    run(scenario)
