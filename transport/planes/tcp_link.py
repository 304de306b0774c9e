"""One connection of the TCP plane: vectored sends, payloads received straight into the handler's buffers.

A message on the wire: magic, version, header length, payload length (16 bytes), header, payload. Lengths are
checked before anything is allocated. A message that has begun must end within a deadline that grows with its
size, so a peer that drips bytes cannot hold a buffer for ever; between messages a link may be silent.
"""

from __future__ import annotations

import logging
import selectors
import socket
import struct
from collections import deque
from concurrent.futures import Future

from anabranch.errors import DeadlineExceeded, FrameTooLarge, MalformedMessage, PeerLost, TransportError
from transport.planes import futures
from transport.planes.base import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, too_large, too_many
from transport.planes.socket_plane import SocketPlane
from transport.planes.stall import message_deadline

logger = logging.getLogger(__name__)

MAGIC = b"AM"
VERSION = 1
PREFIX = struct.Struct("!2sBBHHQ")

READ_AHEAD_BYTES = 64 * 1024
# What one link may receive before the others get their turn.
TURN_BYTES = 8 << 20


class _Outgoing:
    """One queued message: its parts that are not sent yet."""

    __slots__ = ("deadline", "future", "parts")

    def __init__(self, header: bytes, payload: memoryview | None, future: Future[None]) -> None:
        num_bytes = payload.nbytes if payload is not None else 0
        prefix = PREFIX.pack(MAGIC, VERSION, 0, len(header), 0, num_bytes)
        self.parts: list[memoryview] = [memoryview(prefix + header)]
        if payload is not None and num_bytes:
            self.parts.append(payload.cast("B"))
        self.future = future
        # Starts when the message comes to the head of the queue.
        self.deadline = 0.0


class TcpLink:
    """One connection. All but `send` and `close` run on the progress thread.

    Args:
        owner: the plane.
        sock: connected.
        peer: the other end's name, for errors.
    """

    def __init__(self, owner: SocketPlane[TcpLink], sock: socket.socket, peer: str) -> None:
        self.peer = peer
        self._owner = owner
        self._sock = sock
        self._fd = sock.fileno()
        self._outgoing: deque[_Outgoing] = deque()
        self._error: Exception | None = None
        self._writing = False
        self._ahead = memoryview(bytearray(READ_AHEAD_BYTES))
        self._ahead_from = 0
        self._ahead_to = 0
        self._header = b""
        self._payload_bytes = 0
        self._received = 0
        self._in_payload = False
        self._buffer: memoryview | None = None
        self._read_deadline: float | None = None

    def send(self, header: bytes, payload: memoryview | None = None) -> Future[None]:
        refusal = too_large(header, payload)
        if refusal is not None:
            return futures.failed(refusal)
        overrun = too_many(len(self._outgoing), self.peer)
        if overrun is not None:
            self._owner.loop.call_soon(lambda: self.drop(overrun))
            return futures.failed(overrun)
        future: Future[None] = Future()
        self._outgoing.append(_Outgoing(header, payload, future))
        if self._error is not None:  # after the append: either this or `_drop` sees the message
            self._fail_outgoing(self._error)
        else:
            self._owner.loop.call_soon(self._write)
        return future

    def close(self) -> None:
        self._owner.loop.call_soon(lambda: self.drop(PeerLost(f"link to {self.peer} closed at this end")))

    def start(self) -> None:
        self._owner.loop.watch(self._fd, selectors.EVENT_READ, self._ready)

    def drop(self, error: Exception) -> None:
        """End the link: its messages fail, `on_lost` is called once."""
        if self._error is not None:
            return
        self._error = error
        self._owner.loop.unwatch(self._fd)
        self._owner.dropped(self)
        self._sock.close()
        self._buffer = None
        self._fail_outgoing(error)
        self._owner.handler.on_lost(self, error)

    def expire(self, now: float) -> float:
        """Drop the link if a message is late by `awake_s`; returns the seconds until one is."""
        left = 3600.0
        if self._read_deadline is not None:
            left = min(left, self._read_deadline - now)
            if left <= 0:
                self.drop(DeadlineExceeded(f"{self.peer} stalled within a message"))
                return 3600.0
        if self._outgoing and self._outgoing[0].deadline:
            left = min(left, self._outgoing[0].deadline - now)
            if left <= 0:
                self.drop(DeadlineExceeded(f"{self.peer} does not read what is sent"))
                return 3600.0
        return left

    def _fail_outgoing(self, error: Exception) -> None:
        while self._outgoing:
            try:
                futures.fail(self._outgoing.popleft().future, error)
            except IndexError:
                return

    def _ready(self) -> None:
        try:
            if self._writing:
                self._write()
            if self._error is None:
                self._read()
        except BlockingIOError:
            pass
        except OSError as error:
            self.drop(PeerLost(f"{self.peer}: {error}"))
        except TransportError as error:
            self.drop(error)
        except Exception as error:
            logger.exception("%s: handler failed; the link is closed", self.peer)
            self.drop(error)

    # Sending -----------------------------------------------------------------------------------------

    def _write(self) -> None:
        if self._error is not None:
            return
        outgoing = self._outgoing
        try:
            while outgoing:
                # Many small messages leave in one system call.
                parts: list[memoryview] = []
                head = outgoing[0]
                if not head.deadline:
                    head.deadline = message_deadline(sum(part.nbytes for part in head.parts))
                for message in outgoing:
                    parts += message.parts
                    if len(parts) >= 64:
                        break
                self._advance(self._sock.sendmsg(parts))
        except BlockingIOError:
            pass
        except OSError as error:
            self.drop(PeerLost(f"{self.peer}: {error}"))
            return
        if bool(outgoing) != self._writing:
            self._writing = bool(outgoing)
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._writing else 0)
            self._owner.loop.watch(self._fd, events, self._ready)

    def _advance(self, num_bytes: int) -> None:
        while num_bytes:
            message = self._outgoing[0]
            while message.parts and num_bytes >= message.parts[0].nbytes:
                num_bytes -= message.parts.pop(0).nbytes
            if message.parts:
                message.parts[0] = message.parts[0][num_bytes:]
                return
            self._outgoing.popleft()
            futures.succeed(message.future)

    # Receiving ---------------------------------------------------------------------------------------

    def _read(self) -> None:
        turn = 0
        while turn < TURN_BYTES and self._error is None:
            if self._in_payload:
                target = self._rest_of_payload()
                # A drained payload, or the end of a short one, goes through the read-ahead buffer.
                if target.nbytes >= READ_AHEAD_BYTES or self._buffer is None:
                    num_bytes = self._sock.recv_into(target)
                    if not num_bytes:
                        raise PeerLost(f"{self.peer} closed the link within a payload")
                    turn += num_bytes
                    self._payload_arrived(num_bytes)
                    continue
            num_bytes = self._sock.recv_into(self._ahead[self._ahead_to :])
            if not num_bytes:
                where = " within a message" if self._read_deadline is not None else ""
                raise PeerLost(f"{self.peer} closed the link{where}")
            turn += num_bytes
            self._ahead_to += num_bytes
            self._parse()

    def _rest_of_payload(self) -> memoryview:
        if self._buffer is not None:
            return self._buffer[self._received :]
        return self._ahead[: min(READ_AHEAD_BYTES, self._payload_bytes - self._received)]

    def _parse(self) -> None:
        """Take whole messages out of the read-ahead buffer."""
        ahead = self._ahead
        while self._error is None:
            have = self._ahead_to - self._ahead_from
            if self._in_payload:
                num_bytes = min(have, self._payload_bytes - self._received)
                if self._buffer is not None:
                    self._buffer[self._received : self._received + num_bytes] = ahead[
                        self._ahead_from : self._ahead_from + num_bytes
                    ]
                self._ahead_from += num_bytes
                self._payload_arrived(num_bytes)
                if self._in_payload:
                    break
                continue
            if have and self._read_deadline is None:
                self._read_deadline = message_deadline(0)
            if have < PREFIX.size:
                break
            magic, version, flags, header_bytes, reserved, payload_bytes = PREFIX.unpack_from(ahead, self._ahead_from)
            if magic != MAGIC or version != VERSION or flags or reserved:
                raise MalformedMessage(f"{self.peer}: not a message of this plane")
            if header_bytes > MAX_HEADER_BYTES:
                raise FrameTooLarge(f"{self.peer}: header of {header_bytes} bytes, at most {MAX_HEADER_BYTES}")
            if payload_bytes > MAX_PAYLOAD_BYTES:
                raise FrameTooLarge(f"{self.peer}: payload of {payload_bytes} bytes, at most {MAX_PAYLOAD_BYTES}")
            if have < PREFIX.size + header_bytes:
                break
            start = self._ahead_from + PREFIX.size
            self._ahead_from = start + header_bytes
            self._begin(bytes(ahead[start : start + header_bytes]), payload_bytes)
        if self._ahead_from == self._ahead_to:
            self._ahead_from = self._ahead_to = 0
        elif self._ahead_from:
            rest = self._ahead_to - self._ahead_from
            ahead[:rest] = bytes(ahead[self._ahead_from : self._ahead_to])
            self._ahead_from, self._ahead_to = 0, rest

    def _begin(self, header: bytes, payload_bytes: int) -> None:
        buffer = self._owner.handler.on_header(self, header, payload_bytes)
        if not payload_bytes:
            self._read_deadline = None
            return
        if buffer is not None and buffer.nbytes != payload_bytes:
            raise MalformedMessage(f"handler gave {buffer.nbytes} bytes for a payload of {payload_bytes}")
        self._header, self._payload_bytes, self._received = header, payload_bytes, 0
        self._buffer = buffer.cast("B") if buffer is not None else None
        self._in_payload = True
        self._read_deadline = message_deadline(payload_bytes)

    def _payload_arrived(self, num_bytes: int) -> None:
        self._received += num_bytes
        if self._received < self._payload_bytes:
            return
        buffer, self._buffer = self._buffer, None
        self._in_payload = False
        self._read_deadline = None
        if buffer is not None:
            self._owner.handler.on_payload(self, self._header, buffer)
