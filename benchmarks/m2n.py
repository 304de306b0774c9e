"""The M2N channel between two processes of this host: latency, bandwidth, and bytes on the wire.

Rows of bfloat16 go to a node, which sends as many back. One way is from before `send` until `poll` has given the call,
by the clock that both processes read; a round trip is from before `send` until `receive` has given the answer. Each
process has one thread and a core. What a message costs is the processor's time of both ends in one thread, without any
waiting: the same whoever else computes.

Each backend is compared with the same bytes without headers, checksums and slots (`m2n_raw.py`): shared memory with
native code that spins, TCP with a blocking socket, UCX with ucxx's core objects. Bandwidth is that of calls that follow
each other.
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

import torch
from msgspec.structs import replace

from anabranch.errors import TransportUnavailable
from benchmarks.m2n_ends import TIMEOUT_S, connect, make_call, next_answer, next_calls
from benchmarks.m2n_raw import raw_shm, raw_tcp, raw_ucx, share
from benchmarks.ranks import Figures, Task, run_ranks
from benchmarks.report import Figure, parse_options, report
from transport.collectives.shm import ShmGroup
from transport.m2n import (
    Answer,
    ChannelShape,
    Combine,
    Link,
    LinkMaker,
    Listener,
    Status,
    create_link_maker,
    create_listener,
    usable_backends,
)

RAW = {"shm": raw_shm, "tcp": raw_tcp, "ucx": raw_ucx}
RAW_NAMES = {"shm": ("native ping", "copy"), "tcp": ("socket", "socket"), "ucx": ("ucxx", "ucxx")}
ROWS = (1, 8, 64, 256, 512)
HIDDEN_SIZES = (576, 2048, 4096, 7168)
QUICK_ROWS = (1, 64, 256)
QUICK_HIDDEN_SIZES = (576, 4096)
BANDWIDTH_FROM_ROWS = 256
SHM_TARGET = 2.0
ABOVE_RAW_TARGET_US = 25.0
BANDWIDTH_TARGET = 0.8
NUM_SLOTS = 4
NUM_ROUNDS = 3
RANKS_TIMEOUT_S = 900.0
HEADER_BYTES = 128


def main() -> int:
    options = parse_options("m2n", __doc__)
    sizes = [
        (rows, hidden)
        for hidden in (QUICK_HIDDEN_SIZES if options.quick else HIDDEN_SIZES)
        for rows in (QUICK_ROWS if options.quick else ROWS)
    ]
    backends = [backend for backend in RAW if _is_usable(backend)]
    task: Task = {"sizes": sizes, "effort": 0.1 if options.quick else 1.0, "backends": backends, "folder": ""}
    with tempfile.TemporaryDirectory() as folder:
        rank, node = run_ranks("benchmarks.m2n", 2, {**task, "folder": folder}, timeout_s=RANKS_TIMEOUT_S)
    found = {**rank, **node}
    figures: list[Figure] = []
    for backend in backends:
        for rows, hidden in sizes:
            figures += _figures(backend, rows, hidden, found)
    figures += _wire_figures()
    return report("m2n", figures, options.json)


def _is_usable(backend: str) -> bool:
    try:
        usable_backends(backend)
    except TransportUnavailable as error:
        print(f"without {backend}: {error}")
        return False
    return True


def _figures(backend: str, rows: int, hidden: int, found: Figures) -> list[Figure]:
    name = name_of(backend, rows, hidden)
    bound = found[f"{name} bound"]
    one_way = found[f"{name} one way p50"]
    raw, raw_stream = RAW_NAMES[backend]
    target = SHM_TARGET if backend == "shm" else None
    figures = [
        _latency(f"{name}, one way, p50", one_way, bound, raw, target),
        _latency(f"{name}, one way, least", found[f"{name} one way least"]),
        _latency(f"{name}, one way, p99", found[f"{name} one way p99"]),
        _latency(f"{name}, round trip, p50", found[f"{name} round trip p50"], 2 * bound, raw),
        _latency(f"{name}, round trip, p99", found[f"{name} round trip p99"]),
        _latency(f"{name}, what a message costs", found[f"{name} cost"]),
    ]
    if backend != "shm":
        above = found[f"{name} round trip p50"] / 2 - bound
        figures.append(_latency(f"{name}, half a round trip above {raw}", above, target=ABOVE_RAW_TARGET_US))
    if rows >= BANDWIDTH_FROM_ROWS:
        figures.append(
            Figure(
                key=f"{name}, bandwidth",
                value=found[f"{name} bandwidth"],
                unit="GB/s",
                reference=found[f"{name} raw bandwidth"],
                reference_name=raw_stream,
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
    sizes, backends = task["sizes"], task["backends"]
    assert isinstance(sizes, list)
    assert isinstance(backends, list)
    for backend in map(str, backends):
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
        rounds[f"{what} least"].append(min(kept))
        rounds[f"{what} p50"].append(statistics.median(kept))
        rounds[f"{what} p99"].append(statistics.quantiles(kept, n=100)[98])

    with contextlib.ExitStack() as stack:
        if group.rank:
            listener = create_listener(shape, backend)
            stack.callback(listener.close)
            share(group, listener.addresses[backend])
        else:
            maker = create_link_maker(shape, backend)
            stack.callback(maker.close)
            link = maker.dial({backend: share(group, "")}, "node").attach()
        for turn in range(NUM_ROUNDS):
            if group.rank:
                add("one way", _serve(listener, num_calls, Status.OK))
                _serve(listener, num_calls, Status.NOT_HELD)
            else:
                add("round trip", _round_trips(link, maker, x, num_calls, 2 * turn * num_calls))
                rounds["bandwidth"].append(_bandwidth(link, maker, x, num_calls, (2 * turn + 1) * num_calls))
            group.barrier()
            bound, bandwidth = RAW[backend](group, x.nbytes, num_calls, f"{name} {turn}", Path(str(task["folder"])))
            if not group.rank:
                rounds["bound"].append(bound)
                rounds["raw bandwidth"].append(bandwidth)
                rounds["cost"].append(_cost(backend, shape, x, num_calls))
            group.barrier()
    return {f"{name} {what}": statistics.median(values) for what, values in rounds.items()}


def _cost(backend: str, shape: ChannelShape, x: torch.Tensor, num_calls: int) -> float:
    """Microseconds of the processor for a message at both its ends."""
    with contextlib.ExitStack() as stack:
        listener, maker = create_listener(shape, backend), create_link_maker(shape, backend)
        stack.callback(listener.close)
        stack.callback(maker.close)
        link = connect(listener, maker)
        call = make_call(x)
        began_ns = time.thread_time_ns()
        for ticket in range(num_calls):
            link.send(replace(call, ticket=ticket))
            while not (calls := listener.poll()):  # long messages need both ends to go on
                maker.wait(0.0)
                listener.wait(0.0)
            (arrived,) = calls
            listener.answer(arrived, Answer(ticket=ticket, attempt=0, status=Status.OK, rows_RC=arrived.call.rows_TC))
            while link.receive() is None:
                listener.wait(0.0)
                maker.wait(0.0)
        return (time.thread_time_ns() - began_ns) / 1e3 / (2 * num_calls)


def shape_of(rows: int, hidden: int) -> ChannelShape:
    return ChannelShape(
        model="benchmark", dtype=torch.bfloat16, hidden_size=hidden, max_rows=rows, max_choices=8, num_slots=NUM_SLOTS
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


def _round_trips(link: Link, maker: LinkMaker, x: torch.Tensor, num_calls: int, first: int) -> list[float]:
    times: list[float] = []
    pattern = make_call(x)
    for ticket in range(first, first + num_calls):
        # `step` is when it was sent, in nanoseconds.
        call = replace(pattern, ticket=ticket, step=time.monotonic_ns())
        link.send(call)
        answer = next_answer(link, maker)
        times.append((time.monotonic_ns() - call.step) / 1e3)
        assert torch.equal(answer.rows_RC, x), "other rows came back"
    return times


def _bandwidth(link: Link, maker: LinkMaker, x: torch.Tensor, num_calls: int, first: int) -> float:
    pattern = make_call(x)
    began = time.perf_counter()
    for ticket in range(first, first + num_calls):
        if not link.num_free:
            next_answer(link, maker)
        link.send(replace(pattern, ticket=ticket))
    while link.num_free < NUM_SLOTS:
        next_answer(link, maker)
    return num_calls * x.nbytes / (time.perf_counter() - began) / 1e9


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
    link = connect(listener, maker, {"tcp": f"{scheme}:{host}:{relay.port}:{token}"})
    figures: list[Figure] = []
    num_assignments = rows * choices
    experts_TS = torch.zeros(rows, choices, dtype=torch.int32)
    for ticket, combine in enumerate(Combine):
        call = make_call(
            torch.zeros(rows, hidden, dtype=shape.dtype),
            ticket=ticket,
            experts_TS=None if combine == Combine.ROWS else experts_TS,
            weights_TS=experts_TS.float() if combine == Combine.SUMS else None,
        )
        answer_rows = num_assignments if combine == Combine.SLOTS else rows
        rows_RC = torch.zeros(answer_rows, hidden, dtype=torch.float32 if combine == Combine.SUMS else shape.dtype)
        before = list(relay.num_bytes)
        link.send(call)
        (arrived,) = next_calls(listener)
        listener.answer(arrived, Answer(ticket=ticket, attempt=0, status=Status.OK, rows_RC=rows_RC))
        next_answer(link, maker)
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
