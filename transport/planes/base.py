"""A tensor plane: moves messages of a small header and a large payload between processes.

A plane owns one progress thread. Receiving is asked for, never pushed blindly: when a header arrives, the
receiver's handler says where the payload goes (or that it is not wanted, and it is drained), and hears when
it is there. Handlers run on the progress thread and must not block.

A plane's life: construct (listens) -> `address` -> `connect` / incoming links -> `close`.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from anabranch.errors import FrameTooLarge, Overloaded

MAX_HEADER_BYTES = 4096
MAX_PAYLOAD_BYTES = 1 << 30
# Of one link, payloads or not; far more than the buffers of all KV streams on it. Their bytes are bounded with those
# buffers, the headers' with MAX_HEADER_BYTES.
MAX_WAITING_MESSAGES = 1 << 16


def too_large(header: bytes, payload: memoryview | None) -> FrameTooLarge | None:
    """Why a message cannot be sent; None where it can."""
    num_bytes = payload.nbytes if payload is not None else 0
    if len(header) <= MAX_HEADER_BYTES and num_bytes <= MAX_PAYLOAD_BYTES:
        return None
    return FrameTooLarge(f"header {len(header)} of {MAX_HEADER_BYTES}, payload {num_bytes} of {MAX_PAYLOAD_BYTES}")


def too_many(num_waiting: int, peer: str) -> Overloaded | None:
    """Why no more messages can wait for `peer`, whose link must end then; None where they can."""
    if num_waiting < MAX_WAITING_MESSAGES:
        return None
    return Overloaded(f"{peer} does not take what is sent: {num_waiting} messages wait")


class Link(Protocol):
    """One end of a two-way connection."""

    peer: str

    def send(self, header: bytes, payload: memoryview | None = None) -> Future[None]:
        """Queue one message; messages of one link arrive in order.

        The payload (contiguous bytes) must stay unchanged until the future is done. The future fails with
        PeerLost, DeadlineExceeded or FrameTooLarge, and with Overloaded where MAX_WAITING_MESSAGES wait, which ends
        the link. Never blocks.
        """
        ...

    def close(self) -> None: ...


class PlaneHandler(Protocol):
    """What the receiving side supplies."""

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None:
        """Give the buffer (exactly `payload_bytes` long) that the payload goes to, or None to drain it.

        Called also for messages without a payload (`payload_bytes == 0`, the result is not used): these come
        after `on_payload` of all messages before them. A message with a payload may be announced while
        earlier payloads are still on their way; `on_payload` keeps the order. Raising TransportError drops the
        message and closes the link.
        """
        ...

    def on_payload(self, link: Link, header: bytes, buffer: memoryview) -> None:
        """The payload of `header` is in `buffer` (the one that `on_header` gave)."""
        ...

    def on_lost(self, link: Link, error: Exception) -> None:
        """The link is gone, also when this end closed it; called once for each link.

        Buffers given for unfinished payloads are no longer written.
        """
        ...


class Plane(Protocol):
    name: str

    @property
    def address(self) -> str:
        """What a peer passes to `connect`."""
        ...

    def connect(self, address: str, timeout_s: float) -> Link:
        """Open a link. Raises PeerLost or DeadlineExceeded."""
        ...

    def close(self) -> None:
        """Close all links, end the progress thread, release the sockets. Idempotent."""
        ...
