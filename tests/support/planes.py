"""Two ends of a tensor plane, with handlers that keep what arrives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from transport.planes import (
    Link,
    Plane,
    available_planes,
    create_plane,
    handshake,
)

STATUS = {status.name: status for status in available_planes()}
needs_ucx = pytest.mark.skipif(not STATUS["ucx"].usable, reason=f"UCX cannot be had: {STATUS['ucx'].reason}")
PLANES = ["inproc", "tcp", pytest.param("ucx", marks=needs_ucx)]


@dataclass
class Recorder:
    """A handler that keeps what it hears; `refuse` and `drain` say what to do with a header."""

    messages: list[tuple[bytes, bytes]] = field(default_factory=list)
    lost: list[tuple[Link, Exception]] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    refuse: Callable[[bytes], Exception | None] = lambda header: None
    drain: Callable[[bytes], bool] = lambda header: False
    wrong_size: bool = False

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None:
        if link not in self.links:
            self.links.append(link)
        if (error := self.refuse(header)) is not None:
            raise error
        if not payload_bytes:
            self.messages.append((header, b""))
            return None
        if self.drain(header):
            return None
        return memoryview(bytearray(payload_bytes + (1 if self.wrong_size else 0)))

    def on_payload(self, link: Link, header: bytes, buffer: memoryview) -> None:
        self.messages.append((header, bytes(buffer)))

    def on_lost(self, link: Link, error: Exception) -> None:
        self.lost.append((link, error))


@dataclass
class Pair:
    """Two planes of one kind; `a` has connected to `b`."""

    name: str
    at_a: Recorder
    at_b: Recorder
    a: Plane
    b: Plane
    link: Link


def open_pair(name: str) -> Pair:
    at_a, at_b = Recorder(), Recorder()
    a, b = create_plane(name, at_a), create_plane(name, at_b)
    return Pair(name, at_a, at_b, a, b, a.connect(b.address, 5.0))


def pattern(num_bytes: int, seed: int = 1) -> bytes:
    return bytes((index * 31 + seed) % 251 for index in range(min(num_bytes, 4096))) * (num_bytes // 4096 + 1)


def payload_of(num_bytes: int, seed: int = 1) -> memoryview:
    return memoryview(pattern(num_bytes, seed))[:num_bytes]


def endpoint_of(plane: Plane) -> tuple[str, int, bytes]:
    return handshake.parse_address(plane.name, plane.address)
