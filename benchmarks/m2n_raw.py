"""What the M2N channel's backends are compared with: the same bytes without headers, checksums and slots.

Each gives the microseconds that bytes take one way, the median of ping-pongs, and GB/s of bytes that follow each other.
Both ranks of a group call it.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.m2n_ends import TIMEOUT_S
from benchmarks.ping import make_segment, ping_s
from transport.collectives.shm import ShmGroup
from transport.ucx.api import HOST_TRANSPORTS, UcxRequest, UcxWorker, load, make_context, make_worker
from transport.ucx.endpoint import close_endpoint, open_endpoint

NUM_AHEAD = 4
_TEXT_BYTES = 256
_SPINS = 1000


def share(group: ShmGroup, text: str) -> str:
    """Rank 1's text, on both."""
    return _exchange(group, text)[1]


def _exchange(group: ShmGroup, text: str) -> tuple[str, str]:
    padded = text.encode().ljust(_TEXT_BYTES, b"\0")
    assert len(padded) == _TEXT_BYTES, f"{len(padded)} bytes"
    gathered = group.all_gather(torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(1, -1), 0)
    first, second = (bytes(row.tolist()).rstrip(b"\0").decode() for row in gathered)
    return first, second


def raw_shm(group: ShmGroup, num_bytes: int, num_calls: int, name: str, folder: Path) -> tuple[float, float]:
    """Native code that spins; GB/s of one core that copies to shared memory."""
    x = torch.zeros(num_bytes, dtype=torch.uint8)
    path = name.replace(" ", "")
    if group.rank == 0:
        make_segment(folder, path, num_bytes)
    group.barrier()
    bound = ping_s(folder / path, group.rank, x, num_calls) * 1e6
    shared = [group.buffer_like(x) for _ in range(NUM_AHEAD)]
    group.barrier()
    began = time.perf_counter()
    for turn in range(num_calls):
        shared[turn % NUM_AHEAD].copy_(x)
    bandwidth = num_calls * num_bytes / (time.perf_counter() - began) / 1e9
    group.barrier()
    return bound, bandwidth


def raw_tcp(group: ShmGroup, num_bytes: int, num_calls: int, name: str, folder: Path) -> tuple[float, float]:
    """A blocking socket."""
    data = memoryview(bytearray(num_bytes))
    if group.rank:
        with socket.create_server(("127.0.0.1", 0)) as door:
            share(group, str(door.getsockname()[1]))
            sock, _ = door.accept()
    else:
        sock = socket.create_connection(("127.0.0.1", int(share(group, ""))))
    with sock:
        sock.settimeout(TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
        bound = _ping_pong(group, num_calls, lambda: sock.sendall(data), lambda: _fill(sock, data))
        group.barrier()
        began = time.perf_counter()
        for _ in range(num_calls):
            if group.rank:
                _fill(sock, data)
            else:
                sock.sendall(data)
        if group.rank:
            sock.sendall(b"e")
        else:
            _fill(sock, data[:1])
        bandwidth = num_calls * num_bytes / (time.perf_counter() - began) / 1e9
    return bound, bandwidth


def _fill(sock: socket.socket, data: memoryview) -> None:
    while data:
        num_bytes = sock.recv_into(data)
        assert num_bytes, "the other side is gone"
        data = data[num_bytes:]


def raw_ucx(group: ShmGroup, num_bytes: int, num_calls: int, name: str, folder: Path) -> tuple[float, float]:
    """ucxx's core objects, progressed by who waits."""
    core = load()
    worker = make_worker(make_context(HOST_TRANSPORTS))
    peer = _exchange(group, worker.address.tobytes().hex())[1 - group.rank]
    endpoint = open_endpoint(worker, bytes.fromhex(peer), "the other rank")
    tag, data = core.UCXXTag(1), core.Array(np.zeros(num_bytes, np.uint8))

    def send() -> None:
        _finish(worker, endpoint.tag_send(data, tag))

    def receive() -> None:
        _finish(worker, endpoint.tag_recv(data, tag))

    bound = _ping_pong(group, num_calls, send, receive)
    group.barrier()
    began = time.perf_counter()
    ahead: deque[UcxRequest] = deque()
    for _ in range(num_calls):
        ahead.append(endpoint.tag_recv(data, tag) if group.rank else endpoint.tag_send(data, tag))
        if len(ahead) == NUM_AHEAD:
            _finish(worker, ahead.popleft())
    for request in ahead:
        _finish(worker, request)
    if group.rank:
        send()
    else:
        receive()
    bandwidth = num_calls * num_bytes / (time.perf_counter() - began) / 1e9
    group.barrier()
    close_endpoint(endpoint, worker, [], [tag], "the other rank")
    return bound, bandwidth


def _finish(worker: UcxWorker, request: UcxRequest) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not request.completed:
        for _ in range(_SPINS):
            worker.progress()
            if request.completed:
                break
        assert time.monotonic() < end_s, "the other side does not answer"
    request.check_error()


def _ping_pong(group: ShmGroup, num_calls: int, send: Callable[[], object], receive: Callable[[], object]) -> float:
    """Microseconds one way: half the median of there and back."""
    times: list[float] = []
    for _ in range(num_calls):
        began = time.perf_counter()
        if group.rank == 0:
            send()
        receive()
        if group.rank:
            send()
        times.append((time.perf_counter() - began) * 1e6 / 2)
    return statistics.median(times)
