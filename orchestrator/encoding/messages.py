"""What the orchestrator says to the processes that encode prompts, and what they answer.

A frame is four bytes of length and a MessagePack struct. Both ends belong to the orchestrator, so a frame that is
too long or cannot be decoded is a bug, or a process that broke; its connection ends.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Generic, TypeVar

import msgspec

from anabranch.errors import FrameTooLarge, MalformedMessage

_LENGTH = struct.Struct("!I")
# Of a message that carries no prompt and no tokens.
MAX_SMALL_BYTES = 64 * 1024

_T = TypeVar("_T")


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    pass


class EncodeText(_Message, frozen=True, kw_only=True, tag="text"):
    """To an encoder: a plain prompt."""

    text: str


class EncodeChat(_Message, frozen=True, kw_only=True, tag="chat"):
    """To an encoder: a chat of (role, content), to be put through the model's template."""

    messages: tuple[tuple[str, str], ...]


class Rendered(_Message, frozen=True, kw_only=True, tag="rendered"):
    """From an encoder: the chat template is done, the tokenizer begins."""


class Encoded(_Message, frozen=True, kw_only=True, tag="encoded"):
    """From an encoder: the prompt's token ids."""

    ids: list[int]


class Failed(_Message, frozen=True, kw_only=True, tag="failed"):
    """From an encoder or the fork server: the error, as its code and message."""

    code: str
    message: str


class Fork(_Message, frozen=True, kw_only=True, tag="fork"):
    """To the fork server, with the descriptor of the new encoder's connection."""

    name: str


class Forked(_Message, frozen=True, kw_only=True, tag="forked"):
    """From the fork server."""

    pid: int


class End(_Message, frozen=True, kw_only=True, tag="end"):
    """To the fork server: kill an encoder, if it lives, and wait for it."""

    pid: int


class Ended(_Message, frozen=True, kw_only=True, tag="ended"):
    """From the fork server: how the encoder ended, in words."""

    how: str


ToEncoder = EncodeText | EncodeChat
FromEncoder = Rendered | Encoded | Failed
ToForkServer = Fork | End
FromForkServer = Forked | Ended | Failed

_encoder = msgspec.msgpack.Encoder()


def frame(message: _Message) -> bytes:
    """A message as it travels."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameReader(Generic[_T]):
    """Reads messages of one kind.

    Args:
        kind: a message, or a union of them.
        max_bytes: of one message.
    """

    def __init__(self, kind: type[_T], max_bytes: int) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._max_bytes = max_bytes

    async def read(self, reader: asyncio.StreamReader) -> _T | None:
        """The next message; None once the other end has closed. Raises FrameTooLarge, MalformedMessage."""
        try:
            length = self._length(await reader.readexactly(_LENGTH.size))
            return self._decode(await reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def receive(self, connection: socket.socket) -> tuple[_T, int | None] | None:
        """The next message from a blocking socket, and the descriptor that came with it; None at the end."""
        head, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
        if not head:
            return None
        head += self._exactly(connection, _LENGTH.size - len(head))
        body = self._exactly(connection, self._length(head))
        return self._decode(body), descriptors[0] if descriptors else None

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
