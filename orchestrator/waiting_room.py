"""The requests that wait for their first token, those whose prompt is being encoded included: how many, how large."""

from __future__ import annotations

from google.protobuf.message import Message

from anabranch.errors import Overloaded

# While a call lasts, gRPC keeps the bytes that came and the message that was parsed from them.
WIRE_FACTOR = 2
# Of a prompt's id: its int object and its entry of the request's tuple, and up to 16 bytes in the parsed message.
TOKEN_BYTES = 56


def message_bytes(message: Message) -> int:
    """About what a client's message takes, in bytes, for as long as its call lasts."""
    return WIRE_FACTOR * message.ByteSize()


class WaitingRoom:
    """Counts those that wait; full, it refuses.

    Args:
        max_places: most that wait.
        max_bytes: most bytes that they take together; one alone may take more, so that none is refused for ever.
    """

    def __init__(self, max_places: int, max_bytes: int) -> None:
        self._max_places = max_places
        self._max_bytes = max_bytes
        self.num_places = 0
        self.num_bytes = 0

    def enter(self, num_bytes: int) -> Place:
        """Take a place, with so many bytes to begin with. Raises Overloaded."""
        if self.num_places >= self._max_places:
            raise Overloaded(
                f"{self.num_places} requests wait for their first token, as many as max_queued allows; try again later"
            )
        self._check(num_bytes, alone=self.num_places == 0)
        self.num_places += 1
        self.num_bytes += num_bytes
        return Place(self, num_bytes)

    def _check(self, num_bytes: int, *, alone: bool) -> None:
        if not alone and self.num_bytes + num_bytes > self._max_bytes:
            raise Overloaded(
                f"the requests that wait for their first token take {self.num_bytes} bytes and this one {num_bytes} "
                f"more, above the {self._max_bytes} that max_queued_bytes allows; try again later"
            )


class Place:
    """One that waits, until `leave`."""

    def __init__(self, room: WaitingRoom, num_bytes: int) -> None:
        self._room = room
        self._num_bytes = num_bytes
        self._left = False

    def hold_tokens(self, num_tokens: int) -> None:
        """Take room for the prompt's ids as well. Raises Overloaded."""
        assert not self._left
        num_bytes = TOKEN_BYTES * num_tokens
        self._room._check(num_bytes, alone=self._room.num_places == 1)
        self._room.num_bytes += num_bytes
        self._num_bytes += num_bytes

    def leave(self) -> None:
        """Give the place up; a second call does nothing."""
        if not self._left:
            self._left = True
            self._room.num_places -= 1
            self._room.num_bytes -= self._num_bytes
