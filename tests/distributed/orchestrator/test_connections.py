"""Connections that say nothing end, are bounded in number, and keep neither clients nor workers out."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Iterator

import pytest

from anabranch.protocol.workers import Generate
from anabranch_client import Client, Sampling, Unavailable
from benchmarks.attack.http2 import PREFACE, Http2Client, connect, settings
from tests.support.resources import holdings

pytestmark = pytest.mark.distributed

# What a connection says before it falls silent: nothing, half of the preface, all that a client begins with.
BEGINNINGS = {"nothing": b"", "half": PREFACE[:10], "whole": PREFACE + settings(65535)}


@contextlib.contextmanager
def silent(endpoint: str, beginnings: tuple[bytes, ...], number: int) -> Iterator[list[socket.socket]]:
    """Open connections that say their beginning and no more."""
    sockets: list[socket.socket] = []
    try:
        for index in range(number):
            sockets.append(connect(endpoint))
            with contextlib.suppress(OSError):  # refused already
                sockets[-1].sendall(beginnings[index % len(beginnings)])
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def is_open(sock: socket.socket) -> bool:
    """Whether the server has not closed this connection."""
    sock.setblocking(False)
    try:
        while sock.recv(65536):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@pytest.mark.parametrize("beginning", BEGINNINGS)
@pytest.mark.parametrize("bind", ["127.0.0.1:0", "unix"])
def test_a_silent_connection_is_closed(play, wait, tmp_path, beginning, bind):
    async def scenario(world):
        before = holdings()
        with silent(world.orchestrator.grpc_endpoint, (BEGINNINGS[beginning],), 3) as sockets:
            await wait(lambda: not any(is_open(sock) for sock in sockets))
        await wait(lambda: not holdings().beyond(before, spare_threads=100))

    bind = f"unix:{tmp_path}/gateway" if bind == "unix" else bind
    play(scenario, grpc_bind=bind, handshake_timeout_s=0.3, connection_idle_s=0.3)


def test_a_connection_that_gives_no_sign_of_life_is_closed(play):
    async def scenario(world):
        def fall_silent() -> None:
            with Http2Client(world.orchestrator.grpc_endpoint, answers=False) as client:
                client.until_closed()

        await asyncio.to_thread(fall_silent)

    play(scenario, keepalive_s=1.0, keepalive_timeout_s=0.3)


def test_one_more_than_the_most_is_refused_at_once(play, wait):
    async def scenario(world):
        endpoint = world.orchestrator.grpc_endpoint

        def ask() -> None:
            with Client(endpoint) as client:
                client.health()

        async def full() -> bool:
            """Whether a client that has no connection yet is refused."""
            try:
                await asyncio.to_thread(ask)
            except Unavailable:
                return True
            return False

        assert await world.client.health() == "not_serving"
        with silent(endpoint, (BEGINNINGS["whole"],), 3):
            await wait(full)
            # Who is connected goes on, and so do workers.
            await world.worker("both-0", "colocated")
            assert await world.client.health() == "serving"

        async def free() -> bool:
            return not await full()

        await wait(free)

    play(scenario, max_connections=4)


def test_an_idle_client_comes_back(play, wait):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        before = holdings()
        for _ in range(2):
            answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
            request = (await worker.expect(Generate)).request
            await worker.tokens(request, "k", 0)
            await worker.ended(request, "length")
            assert (await answer).text == "k"
            await wait(lambda: not holdings().beyond(before, spare_threads=100))

    play(scenario, connection_idle_s=0.3)


class BlackHole:
    """A way to a server that can stop carrying anything, as a server does that is frozen."""

    async def start(self, endpoint: str) -> str:
        self._target = endpoint.rpartition(":")
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def freeze(self) -> None:
        self._open.clear()

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._target[0], int(self._target[2]))
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.create_task(self._carry(source, sink), name="carries"))

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self._open.wait()
                sink.write(data)
        finally:
            sink.close()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_client_notices_a_frozen_server(play, kind):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        way = BlackHole()
        endpoint = await way.start(world.orchestrator.grpc_endpoint)

        def read_sync() -> None:
            with Client(endpoint, keepalive_s=1.0) as client:
                client.complete("abc")

        async def read_async() -> None:
            async with type(world.client)(endpoint, keepalive_s=1.0) as client:
                await client.complete("abc")

        answer = asyncio.create_task(read_async() if kind == "async" else asyncio.to_thread(read_sync))
        request = (await worker.expect(Generate)).request
        await worker.tokens(request, "k", 0)
        way.freeze()
        with pytest.raises(Unavailable, match="no sign of life") as caught:
            await answer
        assert caught.value.code == "unresponsive"
        await way.close()

    play(scenario)


def test_descriptors_raised_or_lowered_limit_connections(monkeypatch, caplog):
    from orchestrator import connections

    limits = {"now": (1024, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: limits.update(now=new))
    assert connections.max_connections(4096) == 1024 - connections.RESERVED_DESCRIPTORS
    assert "max_connections: 768, not 4096: this process may have 1024 descriptors" in caplog.text
    connections.raise_descriptor_limit()
    assert limits["now"] == (4096, 4096)
    assert connections.max_connections(4096) == 4096 - connections.RESERVED_DESCRIPTORS
    assert connections.max_connections(100) == 100
    limits["now"] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert connections.max_connections(10**6) == 10**6
    limits["now"] = (100, 100)
    assert connections.max_connections(4096) == 50
