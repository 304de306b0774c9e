"""Latency of the collectives between CPU ranks: shared memory against Gloo and against the bound.

The bound of a size is the time that its bytes take one way between two ranks through shared memory, written and
read by spinning C code; from 256 KiB on, that of one copy by one core. Ranks have one thread and a core each.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.ping import make_segment, ping_s
from benchmarks.ranks import Figures, Task, run_ranks
from benchmarks.report import Figure, parse_options, report
from transport.collectives import CollectiveGroup
from transport.collectives.shm import ShmGroup
from transport.collectives.torch_dist import join as join_torch

SIZES = (64, 2048, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
QUICK_SIZES = (64, 2048, 64 << 10, 1 << 20, 4 << 20)
SMALL_BYTES = 2048  # a hidden state of a small model in float32, or of a larger one in bfloat16
SMALL_TARGET_US = 50.0
HIDDEN_TARGET = 0.9
MAX_PING_BYTES = 128 << 10
OPERATIONS = ("all_reduce", "all_gather", "point to point")


def main() -> int:
    options = parse_options("collectives", __doc__)
    sizes = QUICK_SIZES if options.quick else SIZES
    effort = 0.3 if options.quick else 1.0
    with tempfile.TemporaryDirectory() as folder:
        task = {"sizes": sizes, "effort": effort, "gloo": folder}
        found = run_ranks("benchmarks.collectives", 2, task)[0]
    four = run_ranks("benchmarks.collectives", 4, {"sizes": (SMALL_BYTES,), "effort": effort, "gloo": ""})[0]

    small = name_of("all_reduce", SMALL_BYTES)
    figures = [
        _latency("small all_reduce, 2 KiB", found[small], target=SMALL_TARGET_US),
        _latency("small all_reduce, 2 KiB, p99", found[f"{small} p99"]),
        _latency("small all_reduce, 2 KiB, 4 ranks on the same cores", four[small]),
    ]
    for operation in OPERATIONS:
        for size in sizes:
            key = name_of(operation, size)
            figures.append(_latency(key, found[key], found[f"gloo {key}"], "gloo"))
            figures.append(_latency(f"{key}, to the bound", found[key], found[f"bound {size}"], "one way"))
    for where in ("into the segment", "into private memory"):
        for what in ("waited for", "wall clock"):
            key = f"4 MiB transfer {where}: share hidden, {what}"
            target = HIDDEN_TARGET if what == "waited for" else None
            figures.append(Figure(key=key, value=found[key], unit="", target=target))
    return report("collectives", figures, options.json)


def rank_main(group: ShmGroup, task: Task) -> Figures:
    """One rank's measurements, in microseconds where no other unit is named."""
    sizes = [int(str(size)) for size in _sequence(task["sizes"])]
    effort = float(str(task["effort"]))
    figures: Figures = {}
    for size in sizes:
        for operation in OPERATIONS:
            times = _measure(group, operation, size, effort)
            figures[name_of(operation, size)] = statistics.median(times)
            figures[f"{name_of(operation, size)} p99"] = statistics.quantiles(times, n=100)[98]
    folder = str(task["gloo"])
    if not folder:
        return figures
    for size in sizes:
        figures[f"bound {size}"] = _bound(group, size, Path(folder))
    for in_segment, where in ((True, "into the segment"), (False, "into private memory")):
        waited, wall = _hidden(group, in_segment, effort)
        figures[f"4 MiB transfer {where}: share hidden, waited for"] = waited
        figures[f"4 MiB transfer {where}: share hidden, wall clock"] = wall

    gloo = join_torch(backend="gloo", rank=group.rank, size=group.size, rendezvous=Path(folder))
    for size in sizes:
        for operation in OPERATIONS:
            times = _measure(gloo, operation, size, 0.2 * effort)
            figures[f"gloo {name_of(operation, size)}"] = statistics.median(times)
    gloo.close()
    return figures


def name_of(operation: str, size: int) -> str:
    """A figure's key: the operation and each rank's bytes."""
    if size < 1024:
        return f"{operation}, {size} B"
    return f"{operation}, {size >> 10} KiB" if size < 1 << 20 else f"{operation}, {size >> 20} MiB"


def _measure(group: CollectiveGroup, operation: str, size: int, effort: float) -> list[float]:
    """Microseconds of each call; ranks meet before each, outside of the time."""
    x = torch.zeros(size // 4)
    received = group.buffer_like(x)
    to, source = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: group.all_reduce(x),
        "all_gather": lambda: group.all_gather(x, 0),
        "point to point": lambda: group.post([x], to, [received], source).wait(),
    }
    call = calls[operation]
    wanted = max(10, int(effort * (3000 if size <= 64 << 10 else 100_000_000 / size)))
    for _ in range(3):
        call()
    times: list[float] = []
    end = time.perf_counter() + 3.0 * effort
    more = True
    while more:
        for _ in range(max(5, wanted // 20)):
            group.barrier()
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        # One rank's clock decides for all, for they must make the same calls.
        more = len(times) < wanted and time.perf_counter() < end
        more = bool(group.all_gather(torch.tensor([more]), 0)[0])
    return times


def _bound(group: ShmGroup, size: int, folder: Path) -> float:
    x = torch.zeros(size // 4)
    if size <= MAX_PING_BYTES:
        times = []
        for turn in range(3):
            name = f"ping-{size}-{turn}"
            if group.rank == 0:
                make_segment(folder, name, size)
            group.barrier()
            times.append(ping_s(folder / name, group.rank, x, 2000) * 1e6)
        return min(times)
    shared = group.buffer_like(x).zero_()
    times = []
    for _ in range(20):
        group.barrier()
        start = time.perf_counter()
        x.copy_(shared)
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def _hidden(group: ShmGroup, in_segment: bool, effort: float) -> tuple[float, float]:
    """Shares of a 4 MiB exchange's time that vanish behind computing.

    Returns:
        `(waited, wall)`: counted by the time that the rank spends in `post` and `wait`, and by how much longer
        it takes to compute with the transfer than without, which also counts the cycles that copying takes.
    """
    x = torch.ones(1 << 20)
    received = group.buffer_like(x) if in_segment else torch.empty_like(x)
    peer = 1 - group.rank
    a = torch.randn(512, 512)
    waits: dict[str, list[float]] = {"alone": [], "computing": [], "both": [], "exposed": []}

    def compute() -> None:
        for _ in range(8):
            torch.mm(a, a)

    for _ in range(max(20, int(60 * effort))):
        for what in ("alone", "computing", "both"):
            group.barrier()
            start = time.perf_counter()
            handle = group.post([x], peer, [received], peer) if what != "computing" else None
            posted = time.perf_counter()
            if what != "alone":
                compute()
            computed = time.perf_counter()
            if handle is not None:
                handle.wait()
            end = time.perf_counter()
            waits[what].append(end - start)
            if what == "both":
                waits["exposed"].append(posted - start + end - computed)
    alone, computing, both, exposed = (statistics.median(waits[key]) for key in waits)
    return 1 - exposed / alone, 1 - (both - computing) / alone


def _latency(
    key: str, value: float, reference: float | None = None, name: str = "", *, target: float | None = None
) -> Figure:
    return Figure(
        key=key,
        value=value,
        unit="us",
        reference=reference,
        reference_name=name,
        target=target,
        higher_is_better=False,
    )


def _sequence(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


if __name__ == "__main__":
    raise SystemExit(main())
