"""What a backend brings for the ends of a link: a door at the node, a dialler at the rank; and what both agree on."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Protocol

from anabranch.errors import PeerLost
from transport.m2n.base import ChannelShape
from transport.m2n.header import HEADER_BYTES, Kind, max_answer_bytes, max_call_bytes, opener
from transport.m2n.hello import Hello
from transport.m2n.pipe import Opener, Pipe
from transport.m2n.waiter import Waiter
from transport.planes.handshake import NO_TOKEN, Introduction, encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What both ends of a link have agreed on, as one of them sees it.

    Attributes:
        shape: with the rank's sizes.
        answers: whether this is the node's end.
        peer: for logs.
        peer_incarnation: in each header that comes.
        num_in, in_bytes: messages that may be on their way here at a time, and the longest.
        num_out, out_bytes: the same of this end's messages.
    """

    shape: ChannelShape
    answers: bool
    peer: str
    peer_incarnation: int

    @property
    def num_in(self) -> int:
        # An answer is still looked at when its successor has been asked for.
        return self.shape.num_slots + (0 if self.answers else 1)

    @property
    def num_out(self) -> int:
        return self.shape.num_slots

    @property
    def in_bytes(self) -> int:
        return max_call_bytes(self.shape) if self.answers else max_answer_bytes(self.shape)

    @property
    def out_bytes(self) -> int:
        return max_answer_bytes(self.shape) if self.answers else max_call_bytes(self.shape)

    def opener(self) -> Opener:
        """Looks at the headers of what comes."""
        kind = Kind.CALL if self.answers else Kind.ANSWER
        return opener(kind, self.peer_incarnation, self.in_bytes - HEADER_BYTES)


class Door(Protocol):
    """Where a node listens.

    Attributes:
        name: of the backend.
        kind, token: what a hello must show.
        address: what a rank passes to `LinkMaker.dial`.
    """

    name: str
    kind: int
    sock: socket.socket
    token: bytes
    address: str

    def admit(self, sock: socket.socket, hello: Hello, terms: Terms, incarnation: int, waiter: Waiter) -> Pipe:
        """Send the welcome to a rank that is served, and make its pipe.

        Args:
            sock: non-blocking; the pipe's, unless this raises.
            incarnation: of this end.

        Raises:
            TransportError, OSError: the socket is to be closed.
        """
        ...

    def close(self) -> None: ...


class Reached(Protocol):
    """A node that has taken a connection.

    Attributes:
        incarnation: the node's.
    """

    incarnation: int

    def make_pipe(self, terms: Terms, waiter: Waiter) -> Pipe:
        """Make it a pipe, on the thread that computes; nothing is left to be closed here afterwards."""
        ...

    def close(self) -> None:
        """Give it up; from any thread."""
        ...


class Dialler(Protocol):
    """How a rank reaches nodes; from any thread."""

    name: str

    def dial(self, address: str, shape: ChannelShape, incarnation: int, peer: str, timeout_s: float) -> Reached:
        """Connect and say hello. Blocks for at most `timeout_s`.

        Args:
            incarnation: of this end.
            peer: for logs.

        Raises:
            PeerLost: nobody there, or no way to it by this backend.
            DeadlineExceeded, ConfigError, MalformedMessage: see `LinkMaker.dial`.
        """
        ...


def send_welcome(sock: socket.socket, kind: int, introduction: Introduction, *fds: int) -> None:
    """Send a whole welcome; a fresh socket's buffer holds it. Raises PeerLost, OSError."""
    frame = encode(kind, NO_TOKEN, introduction)
    sent = socket.send_fds(sock, [frame], list(fds)) if fds else sock.send(frame)
    if sent != len(frame):
        raise PeerLost("the welcome could not be sent")
