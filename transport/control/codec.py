"""Control messages to bytes and back, with a limit on their size."""

from __future__ import annotations

from types import UnionType

import msgspec

from anabranch.errors import FrameTooLarge, MalformedMessage
from anabranch.protocol.workers import Message

MAX_MESSAGE_BYTES = 8 << 20


class Codec:
    """Encodes any control message, decodes those of one union.

    Args:
        receive_type: union of the message classes that may arrive.
        max_message_bytes: in both directions.
    """

    def __init__(self, receive_type: UnionType | type[Message], max_message_bytes: int) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(receive_type)
        self._max_message_bytes = max_message_bytes

    def encode(self, message: Message) -> bytes:
        """Raises FrameTooLarge."""
        data = self._encoder.encode(message)
        if len(data) > self._max_message_bytes:
            kind = type(message).__name__
            raise FrameTooLarge(f"{kind} of {len(data)} bytes, at most {self._max_message_bytes}")
        return data

    def decode(self, data: bytes) -> Message:
        """Raises FrameTooLarge or MalformedMessage."""
        if len(data) > self._max_message_bytes:
            raise FrameTooLarge(f"message of {len(data)} bytes, at most {self._max_message_bytes}")
        try:
            return self._decoder.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
            raise MalformedMessage(str(error)) from None
