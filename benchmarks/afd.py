"""Attention and FFN apart: what lanes hide, how it compares with whole layers on the same cores, and where it wins.

SmolLM2-135M on two cores, decode steps of one batch and context; all of it is measured in this run:

    A    a step's attention halves, embedding, LM head and sampling, on one core, with FFN answers given at once
    F    a step's FFN products, as the FFN process says
    2T   what is left of a step with one lane: the way there and back

With m lanes a step can take no less than max(m A(b/m), m F(b/m), A(b/m) + F(b/m) + 2T), all of them of b/m rows.
One attention and one FFN process on a core each cannot beat two processes with whole layers on a core each: the same
arithmetic, and rows that travel. What many attention processes share is the FFN's weights: each is read once for all
rows that wait for it.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from anabranch.system.child_process import python_environment, python_module
from benchmarks.report import Figure, parse_options, report

MODEL = "smollm2-135m"
TRANSPORT = "shm"
GAIN_64, GAIN_16, OF_BOUND, BUSY, OF_COLOCATED = 1.5, 1.25, 0.85, 0.9, 0.75
BYTES_SHARED, CPU_SHARED, ROWS_SHARED = 0.6, 0.85, 2.5
NUM_ATTENTION = 4
BLOCK = 16
CLOSE_TIMEOUT_S = 20.0


class Side:
    """A process of `benchmarks.afd_side`."""

    def __init__(self, role: str, *, cores: Sequence[int], dtype: str, kv_bytes: int = 0) -> None:
        options = {
            "role": role,
            "model": MODEL,
            "dtype": dtype,
            "transport": TRANSPORT,
            "cores": list(cores),
            "threads": len(cores) if role == "whole" else 1,
            "kv_bytes": kv_bytes,
        }
        self._process = subprocess.Popen(
            python_module("benchmarks.afd_side", json.dumps(options)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=python_environment({"OMP_NUM_THREADS": str(options["threads"])}),
            text=True,
        )

    @functools.cached_property
    def ready(self) -> dict[str, Any]:
        """What it says once it has loaded; sides load at the same time until somebody looks."""
        return self._line()

    def ask(self, **question: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self.ready
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True, kw_only=True)
class Point:
    """One batch and context; seconds of a step of the whole batch.

    Attributes:
        one_s, lanes_s: with one lane and with `num_lanes`.
        a_s, f_s: of the whole batch.
        a_part_s, f_part_s: of one lane's part of it.
        attention_busy, ffn_busy: shares of the time, with lanes.
    """

    batch: int
    context: int
    num_lanes: int
    one_s: float
    lanes_s: float
    a_s: float
    f_s: float
    a_part_s: float
    f_part_s: float
    attention_busy: float
    ffn_busy: float

    @property
    def way_s(self) -> float:
        """2T of all layers."""
        return max(0.0, self.one_s - self.a_s - self.f_s)

    @property
    def gain(self) -> float:
        return self.one_s / self.lanes_s

    @property
    def bound(self) -> float:
        """The most that lanes can gain."""
        m, a, f = self.num_lanes, self.a_part_s, self.f_part_s
        return (self.a_s + self.f_s + self.way_s) / max(m * a, m * f, a + f + self.way_s)


def measure(attention: Side, ffn: Side, *, batch: int, context: int, num_lanes: int, steps: int) -> Point:
    """All that a point is made of, in turn."""

    def remote(lanes: int) -> dict[str, Any]:
        attention.ask(nodes=[ffn.ready], transport=TRANSPORT, lanes=lanes)
        return attention.ask(how="remote", batch=batch, context=context, lanes=lanes, steps=steps)

    def instant(rows: int) -> float:
        found = attention.ask(how="instant", batch=rows, context=context, lanes=1, steps=steps)
        return float(found["wall_s"]) / steps

    one, several = remote(1), remote(num_lanes)
    return Point(
        batch=batch,
        context=context,
        num_lanes=num_lanes,
        one_s=one["wall_s"] / steps,
        lanes_s=several["wall_s"] / steps,
        a_s=instant(batch),
        f_s=one["compute_us"] / 1e6 / steps,
        a_part_s=instant(batch // num_lanes),
        f_part_s=several["compute_us"] / 1e6 / steps / num_lanes,
        attention_busy=1 - several["waited_s"] / several["wall_s"],
        ffn_busy=several["compute_us"] / 1e6 / several["wall_s"],
    )


def whole_s(sides: Sequence[Side], *, batch: int, context: int, steps: int) -> float:
    """Seconds of a step of a batch shared out among processes with whole layers."""
    part = batch // len(sides)

    def run(side: Side) -> float:
        return float(side.ask(how="whole", batch=part, context=context, lanes=1, steps=steps)["wall_s"])

    with ThreadPoolExecutor(len(sides)) as pool:
        return max(pool.map(run, sides)) / steps


def point_figures(point: Point, *, gain_target: float | None) -> list[Figure]:
    name = f"b{point.batch}_c{point.context}_m{point.num_lanes}"
    slower = max(point.attention_busy, point.ffn_busy)
    return [
        Figure(key=f"{name}_gain", value=point.gain, unit="times one lane", target=gain_target),
        Figure(
            key=f"{name}_gain_of_bound",
            value=point.gain,
            unit="times one lane",
            reference=point.bound,
            reference_name="bound",
            target=OF_BOUND,
        ),
        Figure(key=f"{name}_slower_side_busy", value=slower, unit="of the time", target=BUSY),
        Figure(key=f"{name}_attention_busy", value=point.attention_busy, unit="of the time"),
        Figure(key=f"{name}_ffn_busy", value=point.ffn_busy, unit="of the time"),
        Figure(key=f"{name}_A", value=point.a_s * 1e3, unit="ms a step"),
        Figure(key=f"{name}_F", value=point.f_s * 1e3, unit="ms a step"),
        Figure(key=f"{name}_2T", value=point.way_s * 1e3, unit="ms a step"),
    ]


def balanced_context(attention: Side, ffn: Side, batch: int, contexts: Sequence[int], steps: int) -> int:
    """The context at which A is nearest to F."""
    attention.ask(nodes=[ffn.ready], transport=TRANSPORT, lanes=1)

    def distance(context: int) -> float:
        found = attention.ask(how="remote", batch=batch, context=context, lanes=1, steps=steps)
        instant = attention.ask(how="instant", batch=batch, context=context, lanes=1, steps=steps)
        return abs(float(instant["wall_s"]) - float(found["compute_us"]) / 1e6)

    return min(contexts, key=distance)


def shared_figures(dtype: str, cores: Sequence[int], num_attention: int, steps: int) -> list[Figure]:
    """M attention processes and one FFN process against M + 1 with whole layers: what a token costs."""
    batch, context = 4, 256
    found: dict[int, dict[str, float]] = {}
    for count in (1, num_attention):
        with ExitStack() as stack:
            ffn = stack.enter_context(Side("ffn", cores=cores, dtype=dtype))
            sides = [
                stack.enter_context(Side("attn", cores=cores, dtype=dtype, kv_bytes=256 << 20)) for _ in range(count)
            ]
            for side in sides:
                side.ask(nodes=[ffn.ready], transport=TRANSPORT, lanes=1)
            ffn.ask()

            def run(side: Side) -> dict[str, Any]:
                return side.ask(how="remote", batch=batch, context=context, lanes=1, steps=steps)

            with ThreadPoolExecutor(count) as pool:
                runs = list(pool.map(run, sides))
            served = ffn.ask()
            tokens = count * batch * steps
            layers = sides[0].ready["num_layers"]
            # The first two steps of each side warm it up; the FFN process counts them too.
            counted = tokens + count * batch * 2
            products = served["num_products"]
            found[count] = {
                "cpu": sum(each["cpu_s"] for each in runs) / tokens + served["cpu_s"] / counted,
                "bytes": products * ffn.ready["bytes"] / layers / counted + sides[0].ready["bytes"] / batch,
                "rows": counted * layers / max(1, products),
            }
    count = num_attention + 1
    total = num_attention * batch
    with ExitStack() as stack:
        wholes = [
            stack.enter_context(Side("whole", cores=cores[:1], dtype=dtype, kv_bytes=256 << 20)) for _ in range(count)
        ]
        parts = [total // count + (index < total % count) for index in range(count)]

        def decode(pair: tuple[Side, int]) -> dict[str, Any]:
            side, part = pair
            return side.ask(how="whole", batch=part, context=context, lanes=1, steps=steps)

        with ThreadPoolExecutor(count) as pool:
            runs = list(pool.map(decode, zip(wholes, parts, strict=True)))
        whole_cpu = sum(each["cpu_s"] for each in runs) / (total * steps)
        whole_bytes = count * wholes[0].ready["bytes"] / total
    split = found[num_attention]
    return [
        Figure(
            key=f"{num_attention}+1_weight_bytes_per_token",
            value=split["bytes"] / 1e6,
            unit="MB",
            reference=whole_bytes / 1e6,
            reference_name=f"{count} whole",
            target=BYTES_SHARED,
            higher_is_better=False,
        ),
        Figure(
            key=f"{num_attention}+1_cpu_per_token",
            value=split["cpu"] * 1e3,
            unit="ms",
            reference=whole_cpu * 1e3,
            reference_name=f"{count} whole",
            target=CPU_SHARED,
            higher_is_better=False,
        ),
        Figure(
            key=f"{num_attention}+1_rows_per_product",
            value=split["rows"],
            unit="rows",
            reference=found[1]["rows"],
            reference_name="1+1",
            target=ROWS_SHARED,
        ),
    ]


def main() -> int:
    options = parse_options("afd", __doc__)
    from anabranch.engine.device import resolve_device, resolve_dtype

    dtype = str(resolve_dtype("auto", resolve_device("cpu"))).removeprefix("torch.")
    cores = (sorted(os.sched_getaffinity(0)) * 2)[:2]
    steps = 3 if options.quick else 12
    figures: list[Figure] = []
    contexts = (128, 384) if options.quick else (64, 128, 256, 384, 512, 768)
    kv_bytes = 64 * (max(contexts) + BLOCK) * 2 * 30 * 3 * 64 * (4 if dtype == "float32" else 2)
    with (
        Side("attn", cores=cores[:1], dtype=dtype, kv_bytes=kv_bytes) as attention,
        Side("ffn", cores=cores[1:], dtype=dtype) as ffn,
    ):
        balanced = balanced_context(attention, ffn, 64, contexts, max(2, steps // 4))
        points: list[tuple[int, int, int, float | None]] = [(64, balanced, 2, GAIN_64), (16, balanced, 2, GAIN_16)]
        if not options.quick:
            points += [(64, balanced, 3, None), (64, balanced, 4, None)]
            points += [(batch, context, 2, None) for batch in (1, 4, 16, 64) for context in (64, 512)]
        found = []
        for batch, context, num_lanes, target in points:
            if batch >= num_lanes:
                runs = [
                    measure(attention, ffn, batch=batch, context=context, num_lanes=num_lanes, steps=steps)
                    for _ in range(1 if options.quick else 3)
                ]
                point = sorted(runs, key=lambda run: run.gain)[len(runs) // 2]
                found.append(point)
                figures += point_figures(point, gain_target=target)
    split_s = found[0].lanes_s
    with Side("whole", cores=cores, dtype=dtype, kv_bytes=kv_bytes) as one:
        both_threads_s = statistics.median(
            whole_s([one], batch=64, context=balanced, steps=steps) for _ in range(1 if options.quick else 3)
        )
    with (
        Side("whole", cores=cores[:1], dtype=dtype, kv_bytes=kv_bytes // 2) as first,
        Side("whole", cores=cores[1:], dtype=dtype, kv_bytes=kv_bytes // 2) as second,
    ):
        two_s = statistics.median(
            whole_s([first, second], batch=64, context=balanced, steps=steps) for _ in range(1 if options.quick else 3)
        )
    for name, peer_s in (("two_threads", both_threads_s), ("two_processes", two_s)):
        figures.append(
            Figure(
                key=f"b64_c{balanced}_against_{name}",
                value=64 / split_s,
                unit="tokens/s",
                reference=64 / peer_s,
                reference_name=name,
                target=OF_COLOCATED if peer_s == min(both_threads_s, two_s) else None,
            )
        )
    figures += shared_figures(dtype, cores, 2 if options.quick else NUM_ATTENTION, steps)
    return report("afd", figures, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
