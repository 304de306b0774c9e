"""A client of HTTP/2 frames, for what no gRPC library lets a client do: close its window, stop in the middle.

It knows just enough to begin a gRPC call: preface, SETTINGS, HEADERS (literals without Huffman coding), DATA. It
answers SETTINGS and PING as it must, and grants no window beyond the first.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass
from types import TracebackType

from tests.support.waiting import WAIT_S

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1

_INITIAL_WINDOW_SIZE = 0x4


@dataclass(frozen=True, kw_only=True)
class Frame:
    kind: int
    flags: int
    stream_id: int
    payload: bytes


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One frame as it travels."""
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream_id) + payload


def settings(window_bytes: int) -> bytes:
    """The first frame after the preface, with the size of each stream's window."""
    return frame(SETTINGS, 0, 0, struct.pack("!HI", _INITIAL_WINDOW_SIZE, window_bytes))


def headers(path: str) -> bytes:
    """A header block that begins a gRPC call."""
    fields = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "test"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    )
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)


def _text(text: str) -> bytes:
    data = text.encode()
    assert len(data) < 127
    return bytes((len(data),)) + data


def message(body: bytes) -> bytes:
    """A gRPC message, not compressed."""
    return struct.pack("!BI", 0, len(body)) + body


def connect(endpoint: str) -> socket.socket:
    """A socket to `host:port` or `unix:path`."""
    if endpoint.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(endpoint.removeprefix("unix:"))
        return sock
    host, _, port = endpoint.rpartition(":")
    return socket.create_connection((host, int(port)))


class Http2Client:
    """One connection, whose streams get `window_bytes` and no more.

    Args:
        answers: whether it answers SETTINGS and PING.
    """

    def __init__(self, endpoint: str, *, window_bytes: int = 0, answers: bool = True) -> None:
        self._answers = answers
        self._sock = connect(endpoint)
        self._data = bytearray()
        self._next_id = 1
        self.frames: list[Frame] = []
        self._sock.sendall(PREFACE + settings(window_bytes))

    def call(self, path: str, body: bytes | None) -> int:
        """Begin a call with one message; None: the message never comes. The stream's id."""
        stream_id = self._next_id
        self._next_id += 2
        data = frame(HEADERS, END_HEADERS, stream_id, headers(path))
        if body is not None:
            data += frame(DATA, END_STREAM, stream_id, message(body))
        self._sock.sendall(data)
        return stream_id

    def receive(self, within_s: float) -> bool:
        """Take in what comes, for at most so long; False once the server has closed the connection."""
        self._sock.settimeout(max(within_s, 1e-3))
        try:
            data = self._sock.recv(1 << 16)
        except TimeoutError:
            return True
        except OSError:
            return False
        self._data += data
        while len(self._data) >= 9:
            length = int.from_bytes(self._data[:3], "big")
            if len(self._data) < 9 + length:
                break
            kind, flags, stream_id = struct.unpack_from("!BBI", self._data, 3)
            self._take(Frame(kind=kind, flags=flags, stream_id=stream_id, payload=bytes(self._data[9 : 9 + length])))
            del self._data[: 9 + length]
        return bool(data)

    def _take(self, taken: Frame) -> None:
        self.frames.append(taken)
        if self._answers and taken.kind in (SETTINGS, PING) and not taken.flags & ACK:
            self._sock.sendall(frame(taken.kind, ACK, 0, taken.payload if taken.kind == PING else b""))

    def ended(self, stream_id: int) -> bool:
        """Whether the server has ended this stream, by a reset or in order."""
        return any(
            taken.stream_id == stream_id
            and (taken.kind == RST_STREAM or (taken.kind in (DATA, HEADERS) and taken.flags & END_STREAM))
            for taken in self.frames
        )

    def until_ended(self, *stream_ids: int, within_s: float = WAIT_S) -> None:
        """Wait until the server has ended these streams."""
        deadline = time.monotonic() + within_s
        while not all(self.ended(stream_id) for stream_id in stream_ids):
            left = deadline - time.monotonic()
            missing = [stream_id for stream_id in stream_ids if not self.ended(stream_id)]
            assert left > 0.0, f"{len(missing)} streams go on after {within_s} s: {missing[:5]}"
            assert self.receive(left), f"the connection has ended, {len(missing)} streams with it"

    def until_closed(self, within_s: float = WAIT_S) -> None:
        """Wait until the server has closed the connection."""
        deadline = time.monotonic() + within_s
        while self.receive(max(deadline - time.monotonic(), 0.0)):
            assert time.monotonic() < deadline, f"the connection is open after {within_s} s"

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Http2Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
