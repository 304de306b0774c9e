"""What the control channel's two ends have in common: options of their ZeroMQ sockets, sending, closing."""

from __future__ import annotations

import zmq
import zmq.asyncio

from anabranch.errors import Overloaded, PeerLost

HIGH_WATER_MARK = 10_000
HANDSHAKE_TIMEOUT_MS = 5_000
HEARTBEAT_MS = 2_000
HEARTBEAT_TIMEOUT_MS = 10_000
LINGER_MS = 500


def make_socket(context: zmq.asyncio.Context, kind: int, max_message_bytes: int) -> zmq.asyncio.Socket:
    """A socket that drops frames above the limit, notices dead peers, and never holds up its process."""
    socket = context.socket(kind)
    # One byte more, so that a frame of exactly one byte too many is counted by us, and larger ones cut by ZeroMQ.
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes + 1)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    return socket


async def send_frames(socket: zmq.asyncio.Socket, frames: list[bytes], peer: str) -> None:
    """Queue a message without waiting. Raises PeerLost (unknown peer, closed channel) or Overloaded."""
    if socket.closed:
        raise PeerLost("the control channel is closed")
    try:
        await socket.send_multipart(frames, zmq.NOBLOCK)
    except zmq.Again:
        raise Overloaded(f"control channel to {peer}: {HIGH_WATER_MARK} messages wait to be read") from None
    except zmq.ZMQError as error:
        raise PeerLost(f"control channel to {peer}: {error}") from error


def close_socket(socket: zmq.asyncio.Socket, context: zmq.asyncio.Context) -> None:
    """Close, giving what is queued `LINGER_MS` to leave, and release the descriptors."""
    if not socket.closed:
        socket.close(linger=LINGER_MS)
        context.term()
