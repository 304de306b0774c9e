"""The M2N channel between two processes of this host: latency, bandwidth and bytes on the wire.

Rows of bfloat16 go to a node, which sends as many back. One way is from before `send` until `poll` has given the call,
by the clock that both processes read; a round trip is from before `send` until `receive` has given the answer. Each
process has one thread and a core.

Shared memory is compared with native code that spins and copies the same bytes in and out (`native/ping.cpp`), TCP with
a ping-pong of the same bytes over a blocking socket. Bandwidth is that of calls that follow each other, against copying
by one core and against a stream over a socket.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from benchmarks.ping import make_segment, ping_s
from benchmarks.ranks import Figures, Task, run_ranks
from benchmarks.report import Figure, parse_options, report
from transport.collectives.shm import ShmGroup
from transport.m2n import (
    Answer,
    Call,
    ChannelShape,
    Combine,
    Link,
    LinkMaker,
    Listener,
    Status,
    create_link_maker,
    create_listener,
)

BACKENDS = ("shm", "tcp")
ROWS = (1, 8, 64, 256, 512)
HIDDEN_SIZES = (576, 2048, 4096, 7168)
QUICK_ROWS = (1, 64, 256)
QUICK_HIDDEN_SIZES = (576, 4096)
BANDWIDTH_FROM_ROWS = 256
SHM_TARGET = 2.0
TCP_TARGET_US = 25.0
BANDWIDTH_TARGET = 0.8
NUM_SLOTS = 4
NUM_ROUNDS = 3
TIMEOUT_S = 60.0
HEADER_BYTES = 128
_NO_INDEX = torch.empty(0, dtype=torch.int32)
_NO_WEIGHTS = torch.empty(0)


def main() -> int:
    options = parse_options("m2n", __doc__)
    sizes = [
        (rows, hidden)
        for hidden in (QUICK_HIDDEN_SIZES if options.quick else HIDDEN_SIZES)
        for rows in (QUICK_ROWS if options.quick else ROWS)
    ]
    effort = 0.2 if options.quick else 1.0
    with tempfile.TemporaryDirectory() as folder:
        rank, node = run_ranks("benchmarks.m2n", 2, {"sizes": sizes, "effort": effort, "folder": folder})
    found = {**rank, **node}
    figures: list[Figure] = []
    for backend in BACKENDS:
        for rows, hidden in sizes:
            figures += _figures(backend, rows, hidden, found)
    figures += _wire_figures()
    return report("m2n", figures, options.json)


def _figures(backend: str, rows: int, hidden: int, found: Figures) -> list[Figure]:
    name = name_of(backend, rows, hidden)
    bound = found[f"{name} bound"]
    one_way = found[f"{name} one way p50"]
    reference = "native ping" if backend == "shm" else "socket"
    target = SHM_TARGET if backend == "shm" else None
    figures = [
        _latency(f"{name}, one way, p50", one_way, bound, reference, target),
        _latency(f"{name}, one way, p99", found[f"{name} one way p99"]),
        _latency(f"{name}, round trip, p50", found[f"{name} round trip p50"], 2 * bound, reference),
        _latency(f"{name}, round trip, p99", found[f"{name} round trip p99"]),
    ]
    if backend == "tcp":
        figures.append(_latency(f"{name}, half a round trip above the socket's",
                                found[f"{name} round trip p50"] / 2 - bound, target=TCP_TARGET_US))  # fmt: skip
    if rows >= BANDWIDTH_FROM_ROWS:
        figures.append(
            Figure(
                key=f"{name}, bandwidth",
                value=found[f"{name} bandwidth"],
                unit="GB/s",
                reference=found[f"{name} raw bandwidth"],
                reference_name="copy" if backend == "shm" else "socket",
                target=BANDWIDTH_TARGET,
            )
        )
    return figures


def _latency(
    key: str, value: float, reference: float | None = None, name: str = "", target: float | None = None
) -> Figure:
    return Figure(
        key=key, value=value, unit="us", reference=reference, reference_name=name, target=target, higher_is_better=False
    )


def name_of(backend: str, rows: int, hidden: int) -> str:
    return f"{backend}, {rows} x {hidden}"


def rank_main(group: ShmGroup, task: Task) -> Figures:
    """Rank 0 sends, rank 1 is the node. Microseconds and GB/s."""
    figures: Figures = {}
    sizes = task["sizes"]
    assert isinstance(sizes, list)
    for backend in BACKENDS:
        for rows, hidden in sizes:
            figures.update(_measure(group, backend, int(rows), int(hidden), task))
    return figures


def _measure(group: ShmGroup, backend: str, rows: int, hidden: int, task: Task) -> Figures:
    """Medians of several rounds, each of the channel and then of its bound."""
    name, effort = name_of(backend, rows, hidden), float(str(task["effort"]))
    shape = shape_of(rows, hidden)
    x = torch.randn(rows, hidden).to(shape.dtype)
    num_calls = max(20, int(effort * min(2000, 400_000_000 / x.nbytes)) // NUM_ROUNDS)
    rounds: dict[str, list[float]] = defaultdict(list)

    def add(what: str, times: Sequence[float]) -> None:
        kept = times[len(times) // 10 :]  # the first tenth warms up
        rounds[f"{what} p50"].append(statistics.median(kept))
        rounds[f"{what} p99"].append(statistics.quantiles(kept, n=100)[98])

    raw = _raw_shm if backend == "shm" else _raw_tcp
    with contextlib.ExitStack() as stack:
        if group.rank:
            listener = create_listener(shape, backend)
            stack.callback(listener.close)
            _share(group, listener.addresses[backend])
        else:
            maker = create_link_maker(shape, backend)
            stack.callback(maker.close)
            link = maker.dial({backend: _share(group, "")}, "node").attach()
        for turn in range(NUM_ROUNDS):
            if group.rank:
                add("one way", _serve(listener, num_calls, Status.OK))
                _serve(listener, num_calls, Status.NOT_HELD)
            else:
                add("round trip", _round_trips(link, maker, x, num_calls, 2 * turn * num_calls))
                rounds["bandwidth"].append(_bandwidth(link, maker, x, num_calls, (2 * turn + 1) * num_calls))
            group.barrier()
            bound, bandwidth = raw(group, x.clone(), num_calls, f"{name} {turn}", task)
            if not group.rank:
                rounds["bound"].append(bound)
                rounds["raw bandwidth"].append(bandwidth)
        group.barrier()
    return {f"{name} {what}": statistics.median(values) for what, values in rounds.items()}


def shape_of(rows: int, hidden: int) -> ChannelShape:
    return ChannelShape(
        model="benchmark", dtype=torch.bfloat16, hidden_size=hidden, max_rows=rows, max_choices=8, num_slots=NUM_SLOTS
    )


def _share(group: ShmGroup, address: str) -> str:
    """Rank 1's address, on both."""
    text = address.encode().ljust(256, b"\0")
    gathered = group.all_gather(torch.frombuffer(bytearray(text), dtype=torch.uint8).view(1, -1), 0)
    return bytes(gathered[1].tolist()).rstrip(b"\0").decode()


def _call(ticket: int, rows_TC: torch.Tensor) -> Call:
    """A call whose `step` is when it was sent, in nanoseconds."""
    return Call(
        ticket=ticket,
        step=time.monotonic_ns(),
        layer=0,
        lane=0,
        attempt=0,
        placement=1,
        combine=Combine.ROWS,
        rows_TC=rows_TC,
        rows_A=_NO_INDEX,
        experts_A=_NO_INDEX,
        weights_A=_NO_WEIGHTS,
    )


def _serve(listener: Listener, num_calls: int, status: Status) -> list[float]:
    """Answer so many calls; microseconds that each was on its way."""
    times: list[float] = []
    while len(times) < num_calls:
        listener.wait(TIMEOUT_S)
        for arrived in listener.poll():
            call = arrived.call
            times.append((time.monotonic_ns() - call.step) / 1e3)
            rows_RC = call.rows_TC if status == Status.OK else call.rows_TC[:0]
            answer = Answer(ticket=call.ticket, attempt=call.attempt, status=status, rows_RC=rows_RC)
            listener.answer(arrived, answer)
    return times


def _receive(link: Link, maker: LinkMaker) -> Answer:
    end = time.monotonic() + TIMEOUT_S
    while (answer := link.receive()) is None:
        assert time.monotonic() < end, "the node does not answer"
        maker.wait(TIMEOUT_S)
    return answer


def _round_trips(link: Link, maker: LinkMaker, x: torch.Tensor, num_calls: int, first: int) -> list[float]:
    times: list[float] = []
    for ticket in range(first, first + num_calls):
        call = _call(ticket, x)
        link.send(call)
        answer = _receive(link, maker)
        times.append((time.monotonic_ns() - call.step) / 1e3)
        assert torch.equal(answer.rows_RC, x), "other rows came back"
    return times


def _bandwidth(link: Link, maker: LinkMaker, x: torch.Tensor, num_calls: int, first: int) -> float:
    began = time.perf_counter()
    for ticket in range(first, first + num_calls):
        if not link.num_free:
            _receive(link, maker)
        link.send(_call(ticket, x))
    while link.num_free < NUM_SLOTS:
        _receive(link, maker)
    return num_calls * x.nbytes / (time.perf_counter() - began) / 1e9


def _raw_shm(group: ShmGroup, x: torch.Tensor, num_calls: int, name: str, task: Task) -> tuple[float, float]:
    """Microseconds one way by native code, and GB/s of one core that copies to shared memory."""
    path = name.replace(" ", "")
    folder = Path(str(task["folder"]))
    if group.rank == 0:
        make_segment(folder, path, x.nbytes)
    group.barrier()
    bound = ping_s(folder / path, group.rank, x, num_calls) * 1e6
    shared = [group.buffer_like(x) for _ in range(NUM_SLOTS)]
    group.barrier()
    began = time.perf_counter()
    for turn in range(num_calls):
        shared[turn % NUM_SLOTS].copy_(x)
    bandwidth = num_calls * x.nbytes / (time.perf_counter() - began) / 1e9
    group.barrier()
    return bound, bandwidth


def _raw_tcp(group: ShmGroup, x: torch.Tensor, num_calls: int, name: str, task: Task) -> tuple[float, float]:
    """Microseconds one way over a blocking socket, and GB/s of a stream."""
    data = memoryview(bytearray(x.nbytes))
    if group.rank:
        with socket.create_server(("127.0.0.1", 0)) as door:
            _share(group, str(door.getsockname()[1]))
            sock, _ = door.accept()
    else:
        sock = socket.create_connection(("127.0.0.1", int(_share(group, ""))))
    times: list[float] = []
    with sock:
        sock.settimeout(TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
        for _ in range(num_calls):
            began = time.perf_counter()
            if group.rank == 0:
                sock.sendall(data)
            _fill(sock, data)
            if group.rank:
                sock.sendall(data)
            times.append((time.perf_counter() - began) * 1e6 / 2)
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
        bandwidth = num_calls * x.nbytes / (time.perf_counter() - began) / 1e9
    return statistics.median(times), bandwidth


def _fill(sock: socket.socket, data: memoryview) -> None:
    while data:
        num_bytes = sock.recv_into(data)
        assert num_bytes, "the other side is gone"
        data = data[num_bytes:]


# Bytes on the wire ---------------------------------------------------------------------------------------------------


class Relay:
    """A TCP connection that passes through here and is counted.

    Attributes:
        num_bytes: from the rank, and from the node.
    """

    def __init__(self, port: int) -> None:
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        self.num_bytes = [0, 0]
        self._to = port
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        rank, _ = self._door.accept()
        node = socket.create_connection(("127.0.0.1", self._to))
        threading.Thread(target=self._pass, args=(0, rank, node), daemon=True).start()
        self._pass(1, node, rank)

    def _pass(self, which: int, source: socket.socket, to: socket.socket) -> None:
        while data := source.recv(1 << 16):
            self.num_bytes[which] += len(data)
            to.sendall(data)
        to.shutdown(socket.SHUT_WR)


def _wire_figures() -> list[Figure]:
    """Bytes of a call and of its answer over TCP, counted, against what the layout says."""
    rows, hidden, choices = 33, 577, 3
    shape = dataclasses.replace(shape_of(rows, hidden), max_choices=choices)
    listener, maker = create_listener(shape, "tcp"), create_link_maker(shape, "tcp")
    scheme, host, port, token = listener.addresses["tcp"].split(":")
    relay = Relay(int(port))
    links: list[Link] = []
    connects = threading.Thread(
        target=lambda: links.append(maker.dial({"tcp": f"{scheme}:{host}:{relay.port}:{token}"}, "node").attach())
    )
    connects.start()
    while connects.is_alive():
        listener.poll()
    figures: list[Figure] = []
    num_assignments = rows * choices
    for ticket, combine in enumerate(Combine):
        call = _call(ticket, torch.zeros(rows, hidden, dtype=shape.dtype))
        if combine != Combine.ROWS:
            column = torch.zeros(num_assignments, dtype=torch.int32)
            weights_A = torch.zeros(num_assignments) if combine == Combine.SUMS else _NO_WEIGHTS
            call = msgspec.structs.replace(call, combine=combine, rows_A=column, experts_A=column, weights_A=weights_A)
        answer_rows = num_assignments if combine == Combine.SLOTS else rows
        rows_RC = torch.zeros(answer_rows, hidden, dtype=torch.float32 if combine == Combine.SUMS else shape.dtype)
        before = list(relay.num_bytes)
        links[0].send(call)
        while not (arrived := listener.poll()):
            listener.wait(TIMEOUT_S)
        listener.answer(arrived[0], Answer(ticket=ticket, attempt=0, status=Status.OK, rows_RC=rows_RC))
        _receive(links[0], maker)
        counted = [after - first for after, first in zip(relay.num_bytes, before, strict=True)]
        parts = {Combine.ROWS: 0, Combine.SLOTS: 2, Combine.SUMS: 3}[combine]
        formula = [
            HEADER_BYTES + _up(rows * hidden * 2) + parts * _up(4 * num_assignments),
            HEADER_BYTES + _up(answer_rows * hidden * rows_RC.dtype.itemsize),
        ]
        assert counted == formula, f"{combine.name}: {counted} bytes on the wire, {formula} by the formula"
        for what, value, reference in zip(("a call", "an answer"), counted, formula, strict=True):
            key = f"bytes of {what}, {rows} x {hidden}, {combine.name.lower()}"
            figures.append(
                Figure(key=key, value=value, unit="B", reference=reference, reference_name="formula", target=1.0)
            )
    maker.close()
    listener.close()
    return figures


def _up(num_bytes: int) -> int:
    """Parts begin at multiples of 8 bytes."""
    return -(-num_bytes // 8) * 8


if __name__ == "__main__":
    raise SystemExit(main())
