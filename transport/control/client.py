"""A worker's end of the control channel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from types import UnionType

from anabranch.errors import AccessDenied, Overloaded, PeerLost, TransportError
from anabranch.protocol.workers import Message
from anabranch.system.clock import timeout
from anabranch.system.logs import LimitedLog
from transport.control.codec import MAX_MESSAGE_BYTES, Codec
from transport.control.endpoint import check_secret, keep_alive, parse_endpoint
from transport.control.frames import MAX_UNSENT_BYTES, Backlog, discard, frame, part, read_frame, write_frame
from transport.control.handshake import MAX_NAME_CHARS, introduce

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
FIRST_PAUSE_S, MAX_PAUSE_S = 0.02, 0.5
LINGER_S = 0.5
# Messages that wait for the connection.
MAX_QUEUED_MESSAGES = 10_000


class ControlClient:
    """Connects to a ControlServer, and again whenever the connection breaks. Belongs to the running event loop.

    What is sent before the server is there waits in a bounded queue; whether the server lives is for the
    caller to notice (Beat). To the server a new connection is a new peer. What was on its way when one broke is lost.

    Args:
        endpoint: the server's.
        receive_type: union of the messages that may arrive.
        secret: what the server must know, and is shown to be known here; empty: none, on ipc alone.
        name: for the server's log.

    Raises:
        ConfigError: the endpoint is not one, or has no secret though it needs one.
    """

    def __init__(
        self,
        endpoint: str,
        receive_type: UnionType | type[Message],
        *,
        secret: bytes = b"",
        name: str = "",
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._endpoint = parse_endpoint("orchestrator", endpoint)
        check_secret("orchestrator", self._endpoint, secret)
        self._secret = secret
        self._name = name[:MAX_NAME_CHARS]
        self._max_message_bytes = max_message_bytes
        self._codec = Codec(receive_type, max_message_bytes)
        self._malformed = LimitedLog(logger)
        self._queue: deque[bytes] = deque()
        self._num_queued_bytes = 0
        self._backlog = Backlog()
        self._news = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._failure: AccessDenied | None = None
        self._closed = False
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"control channel of {name}")

    @property
    def num_malformed(self) -> int:
        """Messages that arrived and were none."""
        return self._malformed.num_warnings

    async def recv(self) -> Message:
        """The next message.

        Raises:
            PeerLost: only once the channel is closed.
            AccessDenied: the two ends do not know the same secret.
        """
        while True:
            while not self._backlog:
                self._raise_if_over()
                self._news.clear()
                await self._news.wait()
            data = self._backlog.take()
            try:
                return self._codec.decode(data)
            except TransportError as error:
                self._malformed.warning(f"control channel {self._endpoint}: malformed message: {error}")
                await asyncio.sleep(0)  # a flood of garbage must not starve the event loop

    async def send(self, message: Message) -> None:
        """Queue a message; never waits. Raises PeerLost, AccessDenied, Overloaded or FrameTooLarge."""
        data = self._codec.encode(message)
        self._raise_if_over()
        if self._writer is not None:
            write_frame(self._writer, data, str(self._endpoint))
            return
        if len(self._queue) >= MAX_QUEUED_MESSAGES or self._num_queued_bytes + len(data) > MAX_UNSENT_BYTES:
            raise Overloaded(f"control channel to {self._endpoint}: {len(self._queue)} messages wait for a connection")
        self._queue.append(data)
        self._num_queued_bytes += len(data)

    async def close(self) -> None:
        """Disconnect, giving what is on its way LINGER_S to arrive; without a connection it is lost. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._news.set()
        self._backlog.clear()
        if self._writer is not None:
            part(self._writer)
            await asyncio.wait((self._task,), timeout=LINGER_S)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _raise_if_over(self) -> None:
        if self._closed:
            raise PeerLost("the control channel is closed")
        if self._failure is not None:
            raise self._failure

    # The connection ---------------------------------------------------------------------------------------

    async def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._closed:
            try:
                async with contextlib.AsyncExitStack() as stack:
                    async with timeout(CONNECT_TIMEOUT_S):
                        reader, writer = await self._connect()
                        stack.callback(writer.transport.abort)
                        await introduce(reader, writer, self._secret, self._name)
                    pause_s = FIRST_PAUSE_S
                    await self._serve(reader, writer)
            except AccessDenied as error:
                self._failure = AccessDenied(f"{self._endpoint}: {error}")
                self._news.set()
                return
            except (OSError, TimeoutError, TransportError) as error:
                logger.debug("control channel to %s: %s", self._endpoint, error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if not self._endpoint.is_tcp:
            return await asyncio.open_unix_connection(self._endpoint.path)
        reader, writer = await asyncio.open_connection(self._endpoint.host, self._endpoint.port)
        keep_alive(writer.get_extra_info("socket"))
        return reader, writer

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send what has waited, then take in what comes until the connection ends. Raises TransportError."""
        while self._queue:
            data = self._queue.popleft()
            self._num_queued_bytes -= len(data)
            writer.write(frame(data))
        self._writer = writer
        try:
            while not self._closed:
                data = await read_frame(reader, self._max_message_bytes)
                await self._backlog.put(data)
                self._news.set()
            await discard(reader)
        finally:
            self._writer = None
