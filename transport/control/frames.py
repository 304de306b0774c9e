"""Frames on a byte stream (4 bytes of length, then so many bytes), and the bounded queues at its two ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from anabranch.errors import FrameTooLarge, Overloaded, PeerLost

LENGTH_BYTES = 4
# What one peer may have waiting to be taken; then its connection is not read, and the peer has to wait.
MAX_WAITING_FRAMES = 256
MAX_WAITING_BYTES = 1 << 20
# What may wait to be sent to a peer that does not read.
MAX_UNSENT_BYTES = 32 << 20
PART_TIMEOUT_S = 1.0


def frame(data: bytes) -> bytes:
    """One frame."""
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


async def read_frame(reader: asyncio.StreamReader, max_bytes: int) -> bytes:
    """The next frame's content. Raises PeerLost at the stream's end, FrameTooLarge before it is read."""
    try:
        num_bytes = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
        if num_bytes > max_bytes:
            raise FrameTooLarge(f"frame of {num_bytes} bytes, at most {max_bytes}")
        return await reader.readexactly(num_bytes)
    except (asyncio.IncompleteReadError, OSError) as error:
        raise PeerLost(f"the connection has ended: {error}") from None


def write_frame(writer: asyncio.StreamWriter, data: bytes, peer: str) -> None:
    """Queue a frame without waiting; to a connection that is about to end it is lost. Raises Overloaded."""
    if writer.is_closing():
        return
    num_unsent = writer.transport.get_write_buffer_size()
    if num_unsent and num_unsent + len(data) > MAX_UNSENT_BYTES:
        raise Overloaded(f"control channel to {peer}: {num_unsent} bytes wait to be read")
    writer.write(frame(data))


def part(writer: asyncio.StreamWriter) -> None:
    """Send no more; the other end has a moment to read what was sent and to close."""
    if writer.is_closing():
        return
    with contextlib.suppress(OSError):
        writer.write_eof()
    asyncio.get_running_loop().call_later(PART_TIMEOUT_S, writer.transport.abort)


async def discard(reader: asyncio.StreamReader) -> None:
    """Read until the other end hangs up, and keep nothing."""
    try:
        while await reader.read(1 << 16):
            pass
    except OSError:
        pass


class Backlog:
    """Frames that have come and were not taken yet; one that is full holds up the connection that fills it."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._num_bytes = 0
        self._taken = asyncio.Event()

    def __len__(self) -> int:
        return len(self._frames)

    async def put(self, data: bytes) -> None:
        """Add a frame once there is room; an empty backlog has room for any."""
        while self._frames and (
            len(self._frames) >= MAX_WAITING_FRAMES or self._num_bytes + len(data) > MAX_WAITING_BYTES
        ):
            await self._wait()
        self._frames.append(data)
        self._num_bytes += len(data)

    def take(self) -> bytes:
        """The oldest frame. There must be one."""
        data = self._frames.popleft()
        self._num_bytes -= len(data)
        self._taken.set()
        return data

    def clear(self) -> None:
        """Forget everything that waits."""
        self._frames.clear()
        self._num_bytes = 0
        self._taken.set()

    async def emptied(self) -> None:
        """Wait until everything has been taken."""
        while self._frames:
            await self._wait()

    async def _wait(self) -> None:
        self._taken.clear()
        await self._taken.wait()
