"""A worker's end of the control channel: a DEALER with a name."""

from __future__ import annotations

import asyncio
from types import UnionType

import zmq
import zmq.asyncio

from anabranch.errors import ConfigError, MalformedMessage, TransportError
from anabranch.protocol.workers import Message
from transport.control.codec import MAX_MESSAGE_BYTES, Codec, MalformedLog
from transport.control.server import receive_frames
from transport.control.socket import close_socket, make_socket, send_frames


class ControlClient:
    """Connects to a ControlServer, and again whenever the connection breaks. Belongs to one event loop.

    What is sent before the server is there waits in a bounded queue; whether the server lives is for the
    caller to notice (Beat).

    Args:
        endpoint: the server's.
        receive_type: union of the messages that may arrive.
        identity: 1 to 255 bytes that do not begin with a zero byte; None: the server chooses one.

    Raises:
        ConfigError: the endpoint or the identity is not one.
    """

    def __init__(
        self,
        endpoint: str,
        receive_type: UnionType | type[Message],
        *,
        identity: bytes | None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        if identity is not None and (not 0 < len(identity) < 256 or identity[0] == 0):
            raise ConfigError("identity", identity, "must have 1 to 255 bytes and not begin with a zero byte")
        self._endpoint = endpoint
        self._codec = Codec(receive_type, max_message_bytes)
        self._log = MalformedLog(f"control channel {endpoint}")
        self._context = zmq.asyncio.Context()
        self._socket = make_socket(self._context, zmq.DEALER, max_message_bytes)
        if identity is not None:
            self._socket.setsockopt(zmq.IDENTITY, identity)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError("endpoint", endpoint, f"is not an endpoint that can be connected to: {error}") from error

    @property
    def num_malformed(self) -> int:
        """Messages that arrived and were none."""
        return self._log.num_malformed

    async def recv(self) -> Message:
        """The next message. Raises PeerLost only once the channel is closed."""
        while True:
            frames = await receive_frames(self._socket)
            try:
                if len(frames) != 1:
                    raise MalformedMessage(f"{len(frames)} frames, not one")
                return self._codec.decode(frames[0])
            except TransportError as error:
                self._log.note(b"server", error)
                await asyncio.sleep(0)  # a flood of garbage must not starve the event loop

    async def send(self, message: Message) -> None:
        """Queue a message; never waits. Raises PeerLost, Overloaded or FrameTooLarge."""
        await send_frames(self._socket, [self._codec.encode(message)], self._endpoint)

    def close(self) -> None:
        """Disconnect. Idempotent."""
        close_socket(self._socket, self._context)
