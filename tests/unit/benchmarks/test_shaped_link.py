"""A shaped connection brings every byte, and none before its time."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from benchmarks.shaped_link import Shape, shaped
from transport.planes.handshake import TOKEN_BYTES, format_address, parse_address

pytestmark = pytest.mark.unit
NUM_BYTES = 200_000
TOKEN = b"t" * TOKEN_BYTES


def test_bytes_come_whole_and_not_too_early() -> None:
    shape = Shape(name="far", latency_s=0.02, bytes_per_s=4e6)
    sent = bytes(range(256)) * (NUM_BYTES // 256)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo() -> None:
            peer, _ = server.accept()
            with peer:
                while chunk := peer.recv(1 << 16):
                    peer.sendall(chunk)

        thread = threading.Thread(target=echo, daemon=True)
        thread.start()
        with shaped(format_address("tcp", "127.0.0.1", server.getsockname()[1], TOKEN), shape) as address:
            host, port, token = parse_address("tcp", address)
            assert token == TOKEN
            with socket.create_connection((host, port), timeout=60.0) as near:
                began_s = time.monotonic()
                threading.Thread(target=near.sendall, args=(sent,), daemon=True).start()
                came = bytearray()
                while len(came) < len(sent):
                    came += near.recv(1 << 16)
                taken_s = time.monotonic() - began_s
    assert came == sent
    # There and back, and all bytes one after the other on one of the ways at least.
    assert taken_s >= 2 * shape.latency_s + len(sent) / shape.bytes_per_s
    thread.join(60.0)
    assert not thread.is_alive()
