"""The orchestrator's end of the control channel: it listens, and knows each connection as a peer.

A connection's life: accepted -> proves that it knows the secret (handshake, within HANDSHAKE_TIMEOUT_S) -> a peer ->
dismissed, or gone. Nobody can take over a peer: the server names it, and its name ends with its connection. A peer
counts as there until everything that it said has been taken. Tasks: one for each connection, which reads it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections import deque
from types import UnionType

from anabranch.errors import AccessDenied, AnabranchError, ConfigError, FrameTooLarge, PeerLost, TransportError
from anabranch.protocol.workers import Message
from anabranch.system.clock import timeout
from anabranch.system.logs import LimitedLog
from transport.control.codec import MAX_MESSAGE_BYTES, Codec
from transport.control.endpoint import bound, check_secret, keep_alive, listen, parse_endpoint
from transport.control.frames import Backlog, discard, part, read_frame, write_frame
from transport.control.handshake import admit

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
# Connections that have not proved anything yet; one more ends the oldest, so that silent ones keep nobody out.
MAX_PENDING = 64
MAX_PEERS = 1024
# Messages of one peer that could not be read; one more ends it.
MAX_MALFORMED = 100
LINGER_S = 0.5
# Other tasks get their turn after so many messages, however many wait.
_MESSAGES_PER_TURN = 128


class _Peer:
    """A connection whose other end knows the secret."""

    def __init__(self, key: bytes, writer: asyncio.StreamWriter) -> None:
        self.key = key
        self.writer = writer
        self.backlog = Backlog()
        self.num_malformed = 0
        self.dismissed = False

    def dismiss(self) -> None:
        """Read nothing more of it, let it read what it was sent, and close."""
        self.dismissed = True
        self.backlog.clear()
        part(self.writer)


class ControlServer:
    """Binds when constructed, serves from `start` to `close`. Belongs to one event loop.

    Args:
        bind: `ipc://PATH`, which gets mode 0600, or `tcp://HOST:PORT`; port 0: the system chooses one.
        receive_type: union of the messages that may arrive.
        secret: what peers must know; empty: none, on ipc alone.
        allow_remote: bind beyond loopback and ipc.

    Attributes:
        endpoint: where clients connect.

    Raises:
        ConfigError: the endpoint is not one, has no secret though it needs one, or reaches beyond this machine
            without `allow_remote`.
        TransportUnavailable: the address is taken.
    """

    def __init__(
        self,
        bind: str,
        receive_type: UnionType | type[Message],
        *,
        secret: bytes = b"",
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        allow_remote: bool = False,
    ) -> None:
        endpoint = parse_endpoint("control_bind", bind)
        check_secret("control_bind", endpoint, secret)
        if not allow_remote and not endpoint.is_local:
            raise ConfigError("control_bind", bind, "reaches beyond this machine; say allow_remote if that is meant")
        self._secret = secret
        self._codec = Codec(receive_type, max_message_bytes)
        self._max_message_bytes = max_message_bytes
        self._malformed = LimitedLog(logger)
        self._refused = LimitedLog(logger)
        self._listener = listen("control_bind", endpoint)
        self._bound = bound(endpoint, self._listener)
        self.endpoint = str(self._bound)
        self._server: asyncio.Server | None = None
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending: dict[asyncio.Task[None], None] = {}
        self._peers: dict[bytes, _Peer] = {}
        self._ready: deque[_Peer] = deque()  # those with a backlog, each once, in the order of their turns
        self._news = asyncio.Event()
        self._num_taken = 0
        self._closed = False

    @property
    def num_malformed(self) -> int:
        """Messages that arrived and were none."""
        return self._malformed.num_warnings

    @property
    def num_refused(self) -> int:
        """Connections that ended before they had proved to know the secret."""
        return self._refused.num_warnings

    async def start(self) -> None:
        """Begin to accept connections."""
        if self._bound.is_tcp:
            self._server = await asyncio.start_server(self._accept, sock=self._listener)
        else:
            self._server = await asyncio.start_unix_server(self._accept, sock=self._listener)

    async def recv(self) -> tuple[bytes, Message]:
        """The next message and its peer; peers take turns. Raises PeerLost only once the channel is closed."""
        while True:
            while not self._ready and not self._closed:
                self._news.clear()
                await self._news.wait()
            if self._closed:
                raise PeerLost("the control channel is closed")
            peer = self._ready.popleft()
            if not peer.backlog:  # dismissed meanwhile
                continue
            data = peer.backlog.take()
            if peer.backlog:
                self._ready.append(peer)
            self._num_taken += 1
            if self._num_taken % _MESSAGES_PER_TURN == 0:
                await asyncio.sleep(0)
            try:
                return peer.key, self._codec.decode(data)
            except TransportError as error:
                self._note_malformed(peer, error)
                peer.num_malformed += 1
                if peer.num_malformed > MAX_MALFORMED:
                    peer.dismiss()
                await asyncio.sleep(0)  # a flood of garbage must not starve the event loop

    async def send(self, peer: bytes, message: Message) -> None:
        """Queue a message to a peer; never waits. Raises PeerLost, Overloaded or FrameTooLarge."""
        data = self._codec.encode(message)
        write_frame(self._peer(peer).writer, data, repr(peer))

    async def dismiss(self, peer: bytes, message: Message) -> None:
        """Send a last message if that can be, take no more of this peer's, and hang up. Raises as `send`."""
        try:
            await self.send(peer, message)
        finally:
            if peer in self._peers:
                self._peers[peer].dismiss()

    async def close(self) -> None:
        """Release the address and end all connections, giving what is queued LINGER_S to leave. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._news.set()
        if self._server is not None:
            self._server.close()
        self._listener.close()
        if not self._bound.is_tcp:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._bound.path)
        for task in list(self._pending):
            task.cancel()
        for peer in self._peers.values():
            peer.dismiss()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LINGER_S)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Connections ------------------------------------------------------------------------------------------

    def _peer(self, key: bytes) -> _Peer:
        if self._closed:
            raise PeerLost("the control channel is closed")
        peer = self._peers.get(key)
        if peer is None or peer.dismissed:
            raise PeerLost(f"control channel to {key!r}: the connection has ended")
        return peer

    def _note_malformed(self, peer: _Peer, error: TransportError) -> None:
        self._malformed.warning(f"control channel {self.endpoint}: malformed message from {peer.key[:64]!r}: {error}")

    def _refuse(self, reason: AnabranchError | OSError | str) -> None:
        self._refused.warning(f"control channel {self.endpoint}: connections refused: {reason}")

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closed or len(self._tasks) - len(self._pending) >= MAX_PEERS:
            self._refuse("too many connections")
            writer.transport.abort()
            return
        if len(self._pending) >= MAX_PENDING:
            oldest = next(iter(self._pending))
            del self._pending[oldest]
            oldest.cancel()
            self._refuse("made room for a newer connection")
        task = asyncio.create_task(self._serve(reader, writer), name="control connection")
        self._tasks.add(task)
        self._pending[task] = None

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._pending.pop(task, None)
            writer.transport.abort()  # here, since a task that is cancelled before it starts runs nothing

        task.add_done_callback(ended)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = await self._admit(reader, writer)
        if name is not None:
            task = asyncio.current_task()
            assert task is not None
            self._pending.pop(task, None)
            await self._read(reader, _Peer(b"%d:%s" % (next(self._numbers), name.encode()), writer))

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str | None:
        """The name of a peer that has proved to know the secret, None for any other connection."""
        try:
            async with timeout(HANDSHAKE_TIMEOUT_S):
                if self._bound.is_tcp:
                    keep_alive(writer.get_extra_info("socket"))
                return await admit(reader, writer, self._secret)
        except TimeoutError:
            self._refuse(f"said nothing that counts for {HANDSHAKE_TIMEOUT_S:g} s")
        except AccessDenied as error:
            self._refuse(error)
            part(writer)
            await discard(reader)
        except (TransportError, OSError) as error:
            self._refuse(error)
        return None

    async def _read(self, reader: asyncio.StreamReader, peer: _Peer) -> None:
        """Take in what a peer says, at most as fast as it is taken from there."""
        self._peers[peer.key] = peer
        try:
            while not peer.dismissed:
                data = await read_frame(reader, self._max_message_bytes)
                await peer.backlog.put(data)
                if peer.dismissed:
                    peer.backlog.clear()
                elif len(peer.backlog) == 1:
                    self._ready.append(peer)
                    self._news.set()
            await discard(reader)
        except PeerLost:
            pass
        except FrameTooLarge as error:
            self._note_malformed(peer, error)
        finally:
            peer.writer.transport.abort()
            try:
                await peer.backlog.emptied()
            finally:
                del self._peers[peer.key]
