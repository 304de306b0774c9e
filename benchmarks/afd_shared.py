"""Part `shared` of `benchmarks.afd`: M attention nodes that share one FFN node, against M + 1 with whole layers.

The same total batch, 4 for each attention node, and the same two cores. What a token costs: CPU time of all processes,
bytes of weights that are read for it, and rows of each product; and how many tokens of KV there is room for.

With m lanes each, M attention nodes read their weights M m times a step and the FFN node its own m times, where all of
a lane's rows are one product; M nodes with whole layers read both M times. So splitting reads less where

    w_F (M - m) > M (m - 1) w_A
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from benchmarks.afd_process import Found, Side, at_once, kv_bytes
from benchmarks.report import Figure

BYTES_SHARED, CPU_SHARED, ROWS_SHARED = 0.6, 0.85, 2.5
BATCH, CONTEXT = 4, 256
# The FFN node waits so long for the rows of all attention nodes: one product for all, at the cost of time.
MERGE_WAIT_US = 100_000
# What each process may take, for counting tokens of KV.
PROCESS_BYTES = 1 << 30
WARM_UP_STEPS = 2


def shared_figures(dtype: str, cores: Sequence[int], *, quick: bool) -> list[Figure]:
    steps = 3 if quick else 12
    counts = (1, 2) if quick else (1, 2, 4)
    figures: list[Figure] = []
    ratios: dict[int, float] = {}
    alone_rows = 0.0
    for count in counts:
        split, whole = _split(dtype, cores, count, steps), _whole(dtype, cores, count, steps)
        alone_rows = alone_rows or split["rows"]
        last = count == counts[-1]
        # The rule is about as many nodes with whole layers, not one more.
        ratios[count] = split["bytes"] / (split["attn_bytes"] + split["ffn_bytes"]) * BATCH
        figures += [
            _figure(count, "weight_bytes_per_token", split, whole, "bytes", "MB", 1e-6, BYTES_SHARED if last else None),
            _figure(count, "cpu_per_token", split, whole, "cpu", "ms", 1e3, CPU_SHARED if last else None),
            Figure(key=f"{count}+1_ffn_cpu_per_token", value=split["ffn_cpu"] * 1e3, unit="ms"),
            Figure(
                key=f"{count}+1_rows_per_product",
                value=split["rows"],
                unit="rows",
                reference=alone_rows,
                reference_name="1+1",
                target=ROWS_SHARED if last and count > 1 else None,
            ),
            Figure(
                key=f"{count}+1_kv_tokens_per_GiB",
                value=split["kv_tokens"],
                unit="tokens",
                reference=whole["kv_tokens"],
                reference_name=f"{count + 1} whole",
            ),
        ]
    return figures + _crossover(ratios, split["attn_bytes"], split["ffn_bytes"])


def _figure(
    count: int,
    name: str,
    split: dict[str, float],
    whole: dict[str, float],
    key: str,
    unit: str,
    scale: float,
    target: float | None,
) -> Figure:
    return Figure(
        key=f"{count}+1_{name}",
        value=split[key] * scale,
        unit=unit,
        reference=whole[key] * scale,
        reference_name=f"{count + 1} whole",
        target=target,
        higher_is_better=False,
    )


def _crossover(ratios: dict[int, float], attn_bytes: float, ffn_bytes: float) -> list[Figure]:
    """The fewest attention nodes with which fewer weights are read, as the rule says and as was measured."""
    measured = min((count for count, ratio in ratios.items() if ratio < 1), default=0)
    figures = [Figure(key="crossover_measured_m1", value=measured, unit="attention nodes (0: none)")]
    for lanes in (1, 2):
        fewest = next(
            (count for count in range(1, 65) if ffn_bytes * (count - lanes) > count * (lanes - 1) * attn_bytes), 0
        )
        figures.append(Figure(key=f"crossover_rule_m{lanes}", value=fewest, unit="attention nodes (0: none)"))
    return figures


def _split(dtype: str, cores: Sequence[int], count: int, steps: int) -> dict[str, float]:
    pool_bytes = kv_bytes(BATCH, CONTEXT, dtype)
    with ExitStack() as stack:
        ffn = stack.enter_context(Side("ffn", cores=cores, dtype=dtype, merge_wait_us=MERGE_WAIT_US))
        sides = [stack.enter_context(Side("attn", cores=cores, dtype=dtype, kv_bytes=pool_bytes)) for _ in range(count)]
        for side in sides:
            side.link(ffn.ready, lanes=1)
        ffn.ask()

        def run(side: Side) -> Found:
            return side.decode("remote", batch=BATCH, context=CONTEXT, steps=steps)

        runs = at_once(sides, run)
        served = ffn.ask()
        first = sides[0].ready
        tokens = count * BATCH * steps
        # The first steps of each side warm it up; the FFN process counts them too.
        counted = count * BATCH * (steps + WARM_UP_STEPS)
        ffn_cpu = served["cpu_s"] / counted
        weights = count * first["bytes"] + ffn.ready["bytes"]
        return {
            "cpu": sum(each["cpu_s"] for each in runs) / tokens + ffn_cpu,
            "ffn_cpu": ffn_cpu,
            "bytes": served["num_products"] * ffn.ready["bytes"] / first["num_layers"] / counted
            + first["bytes"] / BATCH,
            "rows": counted * first["num_layers"] / max(1, served["num_products"]),
            "kv_tokens": (PROCESS_BYTES * (count + 1) - weights) / (count + 1) / first["kv_bytes_per_token"],
            "attn_bytes": first["bytes"],
            "ffn_bytes": ffn.ready["bytes"],
        }


def _whole(dtype: str, cores: Sequence[int], count: int, steps: int) -> dict[str, float]:
    """The same total batch on one process more with whole layers."""
    total, processes = count * BATCH, count + 1
    parts = [total // processes + (index < total % processes) for index in range(processes)]
    with ExitStack() as stack:
        sides = [
            stack.enter_context(
                Side("whole", cores=[cores[index % len(cores)]], dtype=dtype, kv_bytes=kv_bytes(BATCH, CONTEXT, dtype))
            )
            for index in range(processes)
        ]
        part_of = dict(zip(map(id, sides), parts, strict=True))

        def run(side: Side) -> Found:
            return side.decode("whole", batch=part_of[id(side)], context=CONTEXT, steps=steps)

        runs = at_once(sides, run)
        first = sides[0].ready
        return {
            "cpu": sum(each["cpu_s"] for each in runs) / (total * steps),
            "bytes": processes * first["bytes"] / total,
            "kv_tokens": (PROCESS_BYTES - first["bytes"]) / first["kv_bytes_per_token"],
        }
