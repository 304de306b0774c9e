"""Tensor planes and the whole KV stream between two processes of this host, against ucx_perftest.

For each plane and size: bandwidth of messages that follow each other, against ucx_perftest's `tag_bw`; latency one
way, against its `tag_lat`; both measured in turn within this run, medians of several rounds. Then the whole KV
stream: slices packed, checksummed, sent, verified and placed into a paged pool, committed and acknowledged.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import IO

import msgspec
import torch

from anabranch.kernels.native import select_kernels
from anabranch.parallel.layout import KvLayout
from anabranch.protocol.kv import KvDestination
from anabranch.system.child_process import python_module
from benchmarks.report import Figure, parse_options, report
from transport.kv_stream import KvStreamSource
from transport.kv_stream.incoming import DTYPES
from transport.planes import Link, create_plane, usable_planes

KIB, MIB = 1 << 10, 1 << 20
SIZES = (KIB, 8 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB)
WINDOW_BYTES = 16 * MIB
MIN_WINDOW = 32
TIMEOUT_S = 60.0
TARGET = 0.8
TARGET_FROM_BYTES = 64 * KIB
# Llama-3-8B's KV of one layer and token: 4 KiB.
LAYOUT = KvLayout(dtype="bfloat16", num_layers=32, num_kv_heads=8, head_dim=128, block_size=16)


class Perftest:
    """ucx_perftest, from the UCX wheel or the system."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self.path = shutil.which("ucx_perftest")
        spec = importlib.util.find_spec("libucx")
        if spec is not None and spec.submodule_search_locations:
            root = Path(next(iter(spec.submodule_search_locations)))
            if (root / "bin" / "ucx_perftest").exists():
                self.path = str(root / "bin" / "ucx_perftest")
                self._environment["LD_LIBRARY_PATH"] = str(root / "lib")

    def measure(self, test: str, num_bytes: int, num_messages: int) -> float:
        """GB/s of `tag_bw`, or microseconds one way of `tag_lat`."""
        assert self.path is not None
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        server = subprocess.Popen(
            [self.path, "-p", port], env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        command = [self.path, "-p", port, "-t", test, "-s", str(num_bytes), "-n", str(num_messages), "-f", "-v"]
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while True:
                done = subprocess.run(
                    [*command, "127.0.0.1"], env=self._environment, capture_output=True, text=True, timeout=TIMEOUT_S
                )
                if done.returncode == 0:
                    break
                assert time.monotonic() < deadline, f"ucx_perftest: {done.stderr}"
        finally:
            server.kill()
            server.wait()
        # iterations, median, average and overall microseconds, then MiB/s: the averages count.
        fields = [float(word) for word in done.stdout.strip().splitlines()[-1].split(",")]
        return fields[5] * MIB / 1e9 if test == "tag_bw" else fields[3]


class Peer:
    """The receiving process."""

    def __init__(self, name: str) -> None:
        self._process = subprocess.Popen(
            python_module("benchmarks.kv_stream_peer", name), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.addresses = self.ask({})

    def ask(self, command: dict[str, object]) -> dict[str, str]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        _write_line(stdin, command)
        answer: dict[str, str] = json.loads(stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(TIMEOUT_S)


def _write_line(pipe: IO[bytes], command: dict[str, object]) -> None:
    pipe.write(json.dumps(command).encode() + b"\n")
    pipe.flush()


class Answers:
    """The sender's handler: counts what comes back."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(max(SIZES)))
        self._come = threading.Semaphore(0)

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None:
        if not payload_bytes:
            self._come.release()
        return self._buffer[:payload_bytes]

    def on_payload(self, link: Link, header: bytes, buffer: memoryview) -> None:
        self._come.release()

    def on_lost(self, link: Link, error: Exception) -> None: ...

    def wait(self) -> None:
        assert self._come.acquire(timeout=TIMEOUT_S), "the peer does not answer"


def bandwidth(link: Link, answers: Answers, num_bytes: int, num_messages: int) -> float:
    """GB/s of messages from one buffer, a window of them on their way, until the peer has them all."""
    payload = memoryview(bytearray(num_bytes))
    window = max(MIN_WINDOW, WINDOW_BYTES // num_bytes)
    on_their_way: deque[Future[None]] = deque()
    began = time.perf_counter()
    for _ in range(num_messages):
        if len(on_their_way) == window:
            # Woken once for half a window: waiting for each message would measure thread switches.
            on_their_way[window // 2].result(TIMEOUT_S)
            for _ in range(window // 2 + 1):
                on_their_way.popleft().result(TIMEOUT_S)
        on_their_way.append(link.send(b"d", payload))
    link.send(b"f")
    answers.wait()
    return num_messages * num_bytes / (time.perf_counter() - began) / 1e9


def latency(link: Link, answers: Answers, num_bytes: int, num_messages: int) -> float:
    """Microseconds one way: half of a message and its echo."""
    payload = memoryview(bytearray(num_bytes))
    began = time.perf_counter()
    for _ in range(num_messages):
        link.send(b"e", payload)
        answers.wait()
    return (time.perf_counter() - began) / num_messages / 2 * 1e6


def stream_bandwidth(source: KvStreamSource, peer: Peer, slice_bytes: int, total_bytes: int, stream_id: int) -> float:
    """GB/s of a whole KV stream whose layers come in pieces of `slice_bytes` of K and V."""
    token_bytes = LAYOUT.token_bytes // LAYOUT.num_layers
    chunk = slice_bytes // token_bytes
    num_tokens = max(chunk, total_bytes // LAYOUT.token_bytes // chunk * chunk)
    layout = json.loads(msgspec.json.encode(LAYOUT))
    peer.ask({"stream_id": stream_id, "num_tokens": num_tokens, "layout": layout})
    destination = KvDestination(
        worker="peer",
        stream_id=stream_id,
        generation=1,
        layout=LAYOUT,
        addresses=({peer_name(peer): peer.addresses["stream"]},),
        block_ids=(),
        num_cached_tokens=0,
        num_tokens=num_tokens,
        lease_s=TIMEOUT_S,
    )
    shape = (chunk, LAYOUT.num_kv_heads, LAYOUT.head_dim)
    k_TKD, v_TKD = (torch.zeros(shape, dtype=DTYPES[LAYOUT.dtype]) for _ in range(2))
    sender = source.open(destination, source_layout=LAYOUT)
    began = time.perf_counter()
    for start in range(0, num_tokens, chunk):
        for layer in range(LAYOUT.num_layers):
            sender.send_layer(layer, 0, start, k_TKD, v_TKD)
    sender.commit(token_id=0)
    stats = sender.wait_ack(TIMEOUT_S)
    took = time.perf_counter() - began
    peer.ask({"close": stream_id})
    return stats.payload_bytes / took / 1e9


def peer_name(peer: Peer) -> str:
    return peer.addresses["stream"].split(":", 1)[0]


def median(measure: Callable[[], float], rounds: int) -> float:
    return statistics.median(measure() for _ in range(rounds))


def size_text(num_bytes: int) -> str:
    return f"{num_bytes // MIB}MiB" if num_bytes >= MIB else f"{num_bytes // KIB}KiB"


def measure_planes(names: tuple[str, ...], quick: bool) -> list[Figure]:
    """All figures: planes in turn with the reference, then whole streams."""
    rounds = 3 if quick else 5
    budget_bytes = (256 if quick else 1024) * MIB
    sizes = tuple(s for s in SIZES if not quick or s in (KIB, 64 * KIB, MIB, 16 * MIB))
    perftest = Perftest()
    if perftest.path is None:
        print("ucx_perftest is not here: figures stand without their reference", file=sys.stderr)
    figures: list[Figure] = []
    references: dict[int, float] = {}
    peers = {name: Peer(name) for name in names}
    answers = {name: Answers() for name in names}
    planes = {name: create_plane(name, answers[name]) for name in names}
    links = {name: planes[name].connect(peers[name].addresses["plane"], TIMEOUT_S) for name in names}
    for num_bytes in sizes:
        num_messages = max(50, min(20_000, budget_bytes // num_bytes))
        num_pings = max(20, min(2_000, budget_bytes // num_bytes // 4))
        seen: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            if perftest.path is not None:
                bw, lat = ((test, num_messages, num_pings)[0] for test in ("tag_bw", "tag_lat"))
                seen.setdefault(("ucx_perftest", "bw"), []).append(perftest.measure(bw, num_bytes, num_messages))
                seen.setdefault(("ucx_perftest", "lat"), []).append(perftest.measure(lat, num_bytes, num_pings))
            for name in names:
                seen.setdefault((name, "bw"), []).append(bandwidth(links[name], answers[name], num_bytes, num_messages))
                seen.setdefault((name, "lat"), []).append(latency(links[name], answers[name], num_bytes, num_pings))
        middle = {key: statistics.median(values) for key, values in seen.items()}
        references[num_bytes] = middle.get(("ucx_perftest", "bw"), 0.0)
        aimed = TARGET if num_bytes >= TARGET_FROM_BYTES else None
        for name in names:
            figures.append(
                Figure(
                    key=f"{name} {size_text(num_bytes)} bandwidth",
                    value=middle[name, "bw"],
                    unit="GB/s",
                    reference=middle.get(("ucx_perftest", "bw")),
                    reference_name="tag_bw",
                    target=aimed if name == "ucx" and perftest.path is not None else None,
                )
            )
            figures.append(
                Figure(
                    key=f"{name} {size_text(num_bytes)} latency",
                    value=middle[name, "lat"],
                    unit="us",
                    reference=middle.get(("ucx_perftest", "lat")),
                    reference_name="tag_lat",
                    higher_is_better=False,
                )
            )
    for plane in planes.values():
        plane.close()
    stream_id = 0
    for name in names:
        kernels = select_kernels(torch.device("cpu"), DTYPES[LAYOUT.dtype])
        source = KvStreamSource(planes=(name,), configured=name, kernels=kernels)
        for num_bytes in (s for s in sizes if s >= 8 * KIB):
            values = []
            for _ in range(rounds):
                stream_id += 1
                values.append(stream_bandwidth(source, peers[name], num_bytes, budget_bytes // 2, stream_id))
            figures.append(
                Figure(
                    key=f"KV stream over {name}, {size_text(num_bytes)} a layer",
                    value=statistics.median(values),
                    unit="GB/s",
                    reference=references[num_bytes] or None,
                    reference_name="tag_bw",
                )
            )
        source.close()
    for peer in peers.values():
        peer.close()
    return figures


def main() -> int:
    options = parse_options("kv_stream", __doc__)
    torch.set_num_threads(1)
    names = tuple(name for name in ("ucx", "tcp") if name in usable_planes())
    return report("kv_stream", measure_planes(names, options.quick), options.json)


if __name__ == "__main__":
    sys.exit(main())
