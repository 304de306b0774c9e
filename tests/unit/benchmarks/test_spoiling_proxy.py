"""As many bytes are changed as asked for, each after so many good ones, and nothing else is."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from benchmarks.spoiling_proxy import SpoilingProxy

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("good_bytes", "most"), [(100, 1), (10, 3), (70_000, 2), (500_000, 1)])
def test_bytes_of_answers_are_changed_as_often_as_asked_for(good_bytes: int, most: int) -> None:
    answer = bytes(200_000)
    told: list[None] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        proxy = SpoilingProxy(
            f"tcp:127.0.0.1:{server.getsockname()[1]}:token", good_bytes, most=most, spoilt=lambda: told.append(None)
        )
        try:
            host, port = proxy.address.split(":")[1:3]
            with closing(socket.create_connection((host, int(port)))) as near:
                far, _ = server.accept()
                with closing(far):
                    near.sendall(b"a call")
                    assert far.recv(6, socket.MSG_WAITALL) == b"a call"
                    far.settimeout(10.0)
                    near.settimeout(10.0)
                    received = bytearray()
                    for start in range(0, len(answer), 20_000):
                        far.sendall(answer[start : start + 20_000])
                        while len(received) < start + 20_000:
                            received += near.recv(1 << 16)
        finally:
            proxy.close()
    spoilt = sum(byte != 0 for byte in received)
    assert spoilt == proxy.num_spoilt == len(told) == (most if good_bytes < len(answer) else 0)
    assert not any(received[:good_bytes])
