"""A connection with the latency and the bandwidth of one over a network: a small proxy for TCP on this host."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from transport.planes.handshake import format_address, parse_address

_CHUNK_BYTES = 1 << 16
# Of what one direction has on its way; a sender beyond it waits, as it would for a network.
_MAX_CHUNKS = 1024


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A way between two hosts.

    Attributes:
        latency_s: one way.
        bytes_per_s: each way.
    """

    name: str
    latency_s: float
    bytes_per_s: float


@contextmanager
def shaped(address: str, shape: Shape) -> Iterator[str]:
    """An address over TCP that leads to another one, as far away as `shape` says."""
    host, port, token = parse_address("tcp", address)
    with socket.create_server((host, 0)) as server:
        threading.Thread(target=_accept, args=(server, (host, port), shape), daemon=True).start()
        try:
            yield format_address("tcp", host, server.getsockname()[1], token)
        finally:
            server.shutdown(socket.SHUT_RDWR)


def _accept(server: socket.socket, target: tuple[str, int], shape: Shape) -> None:
    while True:
        try:
            near, _ = server.accept()
        except OSError:
            return
        far = socket.create_connection(target)
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, sink in ((near, far), (far, near)):
            on_way: queue.Queue[tuple[float, bytes]] = queue.Queue(_MAX_CHUNKS)
            threading.Thread(target=_take, args=(source, on_way, shape), daemon=True).start()
            threading.Thread(target=_bring, args=(sink, on_way), daemon=True).start()


def _take(source: socket.socket, on_way: queue.Queue[tuple[float, bytes]], shape: Shape) -> None:
    """Read, and say when each chunk is there: bytes go one after the other, and then all need the latency."""
    free_s = 0.0
    while True:
        try:
            chunk = source.recv(_CHUNK_BYTES)
        except OSError:
            chunk = b""
        free_s = max(free_s, time.monotonic()) + len(chunk) / shape.bytes_per_s
        on_way.put((free_s + shape.latency_s, chunk))
        if not chunk:
            return


def _bring(sink: socket.socket, on_way: queue.Queue[tuple[float, bytes]]) -> None:
    while True:
        there_s, chunk = on_way.get()
        time.sleep(max(0.0, there_s - time.monotonic()))
        try:
            if not chunk:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(chunk)
        except OSError:
            return
