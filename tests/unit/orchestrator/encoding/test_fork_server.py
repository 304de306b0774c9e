"""A fork server that answers late: nobody gets another's answer, and what stopped us is not its silence."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from anabranch.errors import PeerLost
from anabranch.system.clock import MAX_GAP_S
from orchestrator.encoding import fork_server
from orchestrator.encoding.encoder import Encoder
from orchestrator.encoding.fork_server import ForkServer
from orchestrator.encoding.messages import (
    MAX_SMALL_BYTES,
    End,
    Ended,
    Fork,
    Forked,
    FromForkServer,
    ToForkServer,
)
from tests.support.waiting import WAIT_S
from transport.local_frames import FrameReader, frame

pytestmark = pytest.mark.unit


class Peer:
    """The server's end, which answers as the test says."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._messages = FrameReader[ToForkServer](ToForkServer, MAX_SMALL_BYTES)

    async def asked(self) -> ToForkServer | None:
        received = await asyncio.to_thread(self._messages.receive, self._connection)
        if received is None:
            return None
        message, descriptors = received
        for descriptor in descriptors:
            os.close(descriptor)
        return message

    def answer(self, message: FromForkServer) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody hears it any more
            self._connection.sendall(frame(message))


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[ForkServer, Peer]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(WAIT_S)
    # Not a child of this process, and so one that has ended.
    server = ForkServer(os.getpid(), ours)
    await server.start()
    try:
        yield server, Peer(theirs)
    finally:
        await server.close()
        theirs.close()


def test_a_late_answer_is_nobodys_and_the_server_counts_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "ANSWER_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        async with connected() as (server, peer):
            late = asyncio.create_task(server.fork("a"))
            # It waits for its turn meanwhile, and must not get it.
            behind = asyncio.create_task(server.fork("b"))
            assert await peer.asked() == Fork(name="a")
            with pytest.raises(PeerLost, match=r"said nothing for 0.1 s"):
                await late
            peer.answer(Forked(pid=1))
            with pytest.raises(PeerLost):
                await behind
            with pytest.raises(PeerLost):
                await server.end(2)
            assert await peer.asked() is None
            await asyncio.wait_for(server.wait_ended(), WAIT_S)

    asyncio.run(scenario())


def test_an_answer_that_came_while_this_process_stood_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "ANSWER_TIMEOUT_S", 2 * MAX_GAP_S)

    async def scenario() -> None:
        async with connected() as (server, peer):
            forking = asyncio.create_task(server.fork("a"))
            assert await peer.asked() == Fork(name="a")
            peer.answer(Forked(pid=7))
            time.sleep(4 * MAX_GAP_S)  # noqa: ASYNC251  # the subject
            pid, connection = await forking
            connection.close()
            assert pid == 7

    asyncio.run(scenario())


def test_an_answer_to_something_else_loses_the_server_and_ends_no_lane() -> None:
    async def scenario() -> None:
        async with connected() as (server, peer):
            starting = asyncio.create_task(Encoder.start(server, "a", timeout_s=1.0, max_answer_bytes=100))
            await peer.asked()
            peer.answer(Forked(pid=7))
            encoder = await starting
            ending = asyncio.create_task(encoder.end())
            assert await peer.asked() == End(pid=7)
            peer.answer(Forked(pid=8))
            assert "where Ended was due" in await ending
            peer.answer(Ended(how="exit status 0"))
            with pytest.raises(PeerLost):
                await server.end(9)
            await asyncio.wait_for(server.wait_ended(), WAIT_S)

    asyncio.run(scenario())
