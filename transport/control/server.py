"""The orchestrator's end of the control channel: a ROUTER that knows its peers by identity."""

from __future__ import annotations

import asyncio
import errno
from types import UnionType
from urllib.parse import urlsplit

import zmq
import zmq.asyncio

from anabranch.errors import ConfigError, MalformedMessage, PeerLost, TransportError, TransportUnavailable
from anabranch.protocol.workers import Message
from transport.control.codec import MAX_MESSAGE_BYTES, Codec, MalformedLog
from transport.control.socket import close_socket, make_socket, send_frames
from transport.planes.handshake import is_loopback


class ControlServer:
    """Binds, receives from any peer, sends to one by its identity. Belongs to one event loop.

    Args:
        bind: ZeroMQ endpoint; `tcp://127.0.0.1:*` (or `:0`) lets the system choose the port.
        receive_type: union of the messages that may arrive.
        allow_remote: bind beyond loopback and ipc.

    Raises:
        ConfigError: the endpoint is not one, or reaches beyond this machine without `allow_remote`.
        TransportUnavailable: the address is taken.
    """

    def __init__(
        self,
        bind: str,
        receive_type: UnionType | type[Message],
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        allow_remote: bool = False,
    ) -> None:
        if not allow_remote and not _is_local(bind):
            raise ConfigError("bind", bind, "reaches beyond this machine; say allow_remote if that is meant")
        self._codec = Codec(receive_type, max_message_bytes)
        self._log = MalformedLog(f"control channel {bind}")
        self._context = zmq.asyncio.Context()
        self._socket = make_socket(self._context, zmq.ROUTER, max_message_bytes)
        # Without it a message to a peer that has gone would vanish in silence.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A worker that was killed comes back under its name before the old connection has timed out.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self.close()
            if error.errno in (zmq.EADDRINUSE, zmq.EADDRNOTAVAIL, errno.EACCES):
                raise TransportUnavailable(f"cannot bind {bind}: {error}") from error
            raise ConfigError("bind", bind, f"is not an endpoint that can be bound: {error}") from error
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def num_malformed(self) -> int:
        """Messages that arrived and were none."""
        return self._log.num_malformed

    async def recv(self) -> tuple[bytes, Message]:
        """The next message and the identity of its peer. Raises PeerLost only once the channel is closed."""
        while True:
            frames = await receive_frames(self._socket)
            try:
                if len(frames) != 2:
                    raise MalformedMessage(f"{len(frames) - 1} frames, not one")
                return frames[0], self._codec.decode(frames[1])
            except TransportError as error:
                self._log.note(frames[0], error)
                await asyncio.sleep(0)  # a flood of garbage must not starve the event loop

    async def send(self, peer: bytes, message: Message) -> None:
        """Queue a message to a peer; never waits. Raises PeerLost, Overloaded or FrameTooLarge."""
        await send_frames(self._socket, [peer, self._codec.encode(message)], repr(peer))

    def close(self) -> None:
        """Release the address. Idempotent."""
        close_socket(self._socket, self._context)


def _is_local(endpoint: str) -> bool:
    scheme, _, rest = endpoint.partition("://")
    if scheme in ("ipc", "inproc"):
        return True
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not (port == "*" or (port.isdecimal() and int(port) < 65536)):
        raise ConfigError("bind", endpoint, "must be tcp://HOST:PORT or ipc://PATH")
    return is_loopback(urlsplit(f"//{host}").hostname or "")


async def receive_frames(socket: zmq.asyncio.Socket) -> list[bytes]:
    """The next message's frames. Raises PeerLost once the socket is closed."""
    try:
        if not socket.closed:
            return await socket.recv_multipart()
    except zmq.ZMQError as error:
        raise PeerLost(f"control channel: {error}") from error
    except asyncio.CancelledError:
        # ZeroMQ cancels what waits on a socket that closes; a task that was cancelled itself stays so.
        task = asyncio.current_task()
        if not socket.closed or (task is not None and task.cancelling()):
            raise
    raise PeerLost("the control channel is closed")
