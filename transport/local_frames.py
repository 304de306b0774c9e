"""Frames between a process and those that it forked: four bytes of length and a MessagePack struct.

Both ends are the same program, so a frame that is too long or cannot be decoded is a bug, or a process that broke; its
connection ends.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Generic, TypeVar

import msgspec

from anabranch.errors import FrameTooLarge, MalformedMessage

_LENGTH = struct.Struct("!I")

_T = TypeVar("_T")

_encoder = msgspec.msgpack.Encoder()


def frame(message: msgspec.Struct) -> bytes:
    """A message as it travels."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def send_with_descriptors(connection: socket.socket, message: msgspec.Struct, descriptors: list[int]) -> None:
    """Send a message of any length on a blocking socket, and descriptors beside its first bytes. Raises OSError."""
    data = frame(message)
    connection.sendall(data[socket.send_fds(connection, [data], descriptors) :])


class FrameReader(Generic[_T]):
    """Reads messages of one kind.

    Args:
        kind: a message, or a union of them.
        max_bytes: of one message.
        max_descriptors: that may come with one.
    """

    def __init__(self, kind: type[_T], max_bytes: int, max_descriptors: int = 1) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._max_bytes = max_bytes
        self._max_descriptors = max_descriptors

    async def read(self, reader: asyncio.StreamReader) -> _T | None:
        """The next message; None once the other end has closed. Raises FrameTooLarge, MalformedMessage."""
        try:
            length = self._length(await reader.readexactly(_LENGTH.size))
            return self._decode(await reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def receive(self, connection: socket.socket) -> tuple[_T, list[int]] | None:
        """The next message from a blocking socket, and the descriptors that came with it; None at the end."""
        head, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, self._max_descriptors)
        if not head:
            return None
        head += self._exactly(connection, _LENGTH.size - len(head))
        body = self._exactly(connection, self._length(head))
        return self._decode(body), list(descriptors)

    def _length(self, head: bytes) -> int:
        (length,) = _LENGTH.unpack(head)
        if length > self._max_bytes:
            raise FrameTooLarge(f"a message of {length} bytes; at most {self._max_bytes} were due")
        return int(length)

    def _decode(self, body: bytes) -> _T:
        try:
            return self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise MalformedMessage(f"a message that cannot be decoded: {error}") from error

    @staticmethod
    def _exactly(connection: socket.socket, num_bytes: int) -> bytes:
        parts = []
        while num_bytes:
            part = connection.recv(min(num_bytes, 1 << 20))
            if not part:
                raise ConnectionResetError("the other end closed within a message")
            parts.append(part)
            num_bytes -= len(part)
        return b"".join(parts)
