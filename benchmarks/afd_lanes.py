"""Part `lanes` of `benchmarks.afd`: what two and more lanes hide, and whole layers on the same cores."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.afd_process import Found, Side, at_once, kv_bytes
from benchmarks.report import Figure

GAIN_64, GAIN_16, OF_BOUND, BUSY, OF_COLOCATED = 1.5, 1.25, 0.85, 0.9, 0.75
BATCH = 64
MIN_CONTEXT, MAX_CONTEXT = 16, 768


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

    def remote(lanes: int) -> Found:
        attention.link(ffn.ready, lanes=lanes)
        return attention.decode("remote", batch=batch, context=context, lanes=lanes, steps=steps)

    def instant(rows: int) -> float:
        return float(attention.decode("instant", batch=rows, context=context, steps=steps)["wall_s"]) / steps

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
    runs = at_once(sides, lambda side: side.decode("whole", batch=part, context=context, steps=steps))
    return float(max(run["wall_s"] for run in runs)) / steps


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


def balanced_context(attention: Side, ffn: Side, steps: int, resolution: int) -> tuple[int, list[Figure]]:
    """The context at which A = F, by bisection: F does not depend on it, and A grows with it.

    Args:
        resolution: tokens within which it is found. Where A is above F at the shortest context already, that is it;
            where A is below F at the longest, that one.
    """
    attention.link(ffn.ready, lanes=1)
    found = attention.decode("remote", batch=BATCH, context=MIN_CONTEXT, steps=steps)
    ffn_s = float(found["compute_us"]) / 1e6 / steps

    def attention_s(context: int) -> float:
        runs = [attention.decode("instant", batch=BATCH, context=context, steps=steps) for _ in range(2)]
        return min(float(run["wall_s"]) for run in runs) / steps

    low, high = MIN_CONTEXT, MAX_CONTEXT
    at_low_s = attention_s(low)
    if at_low_s >= ffn_s:
        high, at_s = low, at_low_s
    else:
        at_s = attention_s(high)
        if at_s < ffn_s:
            low = high
    while high - low > resolution:
        middle = (low + high) // 2
        middle_s = attention_s(middle)
        if middle_s < ffn_s:
            low = middle
        else:
            high, at_s = middle, middle_s
    return high, [
        Figure(key="balanced_context", value=high, unit="tokens"),
        Figure(
            key="balanced_A",
            value=at_s * 1e3,
            unit="ms a step",
            reference=ffn_s * 1e3,
            reference_name="F",
        ),
    ]


def lanes_figures(dtype: str, cores: Sequence[int], *, quick: bool) -> list[Figure]:
    """A, F and 2T, what lanes gain, and whole layers on the same cores."""
    steps, repeats = (3, 1) if quick else (8, 3)
    pool_bytes = kv_bytes(BATCH, MAX_CONTEXT, dtype)
    with (
        Side("attn", cores=cores[:1], dtype=dtype, kv_bytes=pool_bytes) as attention,
        Side("ffn", cores=cores[1:], dtype=dtype) as ffn,
    ):
        balanced, figures = balanced_context(attention, ffn, 2, 64 if quick else 16)
        points: list[tuple[int, int, int, float | None]] = [(64, balanced, 2, GAIN_64), (16, balanced, 2, GAIN_16)]
        if not quick:
            points += [(64, balanced, 3, None), (64, balanced, 4, None)]
            points += [(batch, context, 2, None) for batch in (4, 16, 64) for context in (64, 512)]
        found = []
        for batch, context, num_lanes, target in points:
            runs = [
                measure(attention, ffn, batch=batch, context=context, num_lanes=num_lanes, steps=steps)
                # Those with a target, and none of the others, are worth their time several times.
                for _ in range(repeats if target else 1)
            ]
            found.append(sorted(runs, key=lambda run: run.gain)[len(runs) // 2])
            figures += point_figures(found[-1], gain_target=target)
    return figures + _against_whole(dtype, cores, found[0], steps, repeats)


def _against_whole(dtype: str, cores: Sequence[int], point: Point, steps: int, repeats: int) -> list[Figure]:
    """Whole layers in one process on both cores, and in two on one each."""
    batch, context = point.batch, point.context
    peers: dict[str, float] = {}
    for name, each in (("two_threads", [cores]), ("two_processes", [cores[:1], cores[1:]])):
        share_bytes = kv_bytes(batch, context, dtype) // len(each)
        sides = [Side("whole", cores=part, dtype=dtype, kv_bytes=share_bytes + (1 << 20)) for part in each]
        try:
            runs = [whole_s(sides, batch=batch, context=context, steps=steps) for _ in range(repeats)]
        finally:
            for side in sides:
                side.close()
        peers[name] = statistics.median(runs)
    return [
        Figure(
            key=f"b{batch}_c{context}_against_{name}",
            value=batch / point.lanes_s,
            unit="tokens/s",
            reference=batch / peer_s,
            reference_name=name,
            target=OF_COLOCATED if peer_s == min(peers.values()) else None,
        )
        for name, peer_s in peers.items()
    ]
