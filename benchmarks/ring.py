"""Ring attention in prefill: 1 and 2 ranks of one thread each, joined by shared memory.

The layers are SmolLM2-135M's (9 query heads, 3 KV heads, head dim 64, bfloat16) with random weights, 4 of
them; one rank runs paged attention as a worker does. Speed-up and memory are of the whole stack of layers;
bytes, hidden transfers, zigzag and pass-Q are of one layer's attention.

Hidden is the share of the transfer's time alone that no rank waits for once all have computed. Where pass-Q
overtakes pass-KV is measured over chunks of 16 to 8,192 new tokens behind a cached prefix, and predicted by
the rule from this run's rates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from anabranch.attention.pass_rule import HeadShape, PassRule, RingRates, ring_cost
from benchmarks.chart import Series, line_chart
from benchmarks.random_model import HEAD_DIM, HEADS, KV_HEADS
from benchmarks.ranks import Figures, run_ranks
from benchmarks.report import Figure, Options, option_parser, report
from benchmarks.ring_rank import DTYPE

NUM_LAYERS = 4
SHAPE = HeadShape(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, element_bytes=DTYPE.itemsize)
SPEED_UP_TARGET, HIDDEN_TARGET = 1.8, 0.9
SPEED_UP_TOKENS = 8192
VARIANTS = ("pass_kv", "pass_q")


def prefill_figures(sizes: list[int]) -> list[Figure]:
    cases = [[f"p{tokens}", "prefill", str(tokens), str(NUM_LAYERS)] for tokens in sizes]
    [one] = run_ranks("benchmarks.ring_rank", 1, {"cases": cases})
    two = run_ranks("benchmarks.ring_rank", 2, {"cases": cases})
    figures = []
    for tokens in sizes:
        label, name = f"{tokens // 1024}k tokens", f"p{tokens}"
        for what, key in (("prefill", "prefill_s"), ("attention", "attention_s")):
            alone_s, both_s = one[f"{name}.{key}"], max(rank[f"{name}.{key}"] for rank in two)
            asked = what == "prefill" and tokens == SPEED_UP_TOKENS
            figures.append(
                Figure(
                    key=f"{label}: {what}, speed-up of 2 ranks",
                    value=1.0 / both_s,
                    unit="passes/s",
                    reference=1.0 / alone_s,
                    reference_name="1 rank",
                    target=SPEED_UP_TARGET if asked else None,
                )
            )
        if tokens == sizes[-1]:
            figures.append(
                Figure(
                    key=f"{label}: KV and activations of a rank, peak",
                    value=max(rank[f"{name}.peak_bytes"] for rank in two) / 2**20,
                    unit="MiB",
                    reference=one[f"{name}.peak_bytes"] / 2**20,
                    reference_name="1 rank",
                    higher_is_better=False,
                )
            )
    return figures


def bytes_formula(variant: str, num_new: int, cached: int) -> float:
    """Bytes that each of 2 ranks sends in a layer; sizes here divide evenly."""
    row = HEAD_DIM * DTYPE.itemsize
    if variant == "pass_kv":
        return (num_new + cached) / 2 * 2 * KV_HEADS * row
    # Queries; results and their LSE; and the new KV whose place is on the other rank.
    return num_new / 2 * HEADS * row + num_new / 2 * (HEADS * row + HEADS * 4) + num_new / 4 * 2 * KV_HEADS * row


def ring_figures(tokens: int) -> list[Figure]:
    """Bytes, hidden transfers and zigzag, of a fresh prompt."""
    cases = [
        ["kv", "ring", str(tokens), "0", "pass_kv", "zigzag"],
        ["q", "ring", str(tokens), "0", "pass_q", "zigzag"],
        ["plain", "ring", str(tokens), "0", "pass_kv", "plain"],
        ["link", "link", str(int(bytes_formula("pass_kv", tokens, 0)))],
    ]
    ranks = run_ranks("benchmarks.ring_rank", 2, {"cases": cases})
    label = f"{tokens // 1024}k tokens"
    figures = [
        Figure(
            key=f"{label}: {variant.replace('_', '-')}, bytes sent by a rank",
            value=ranks[0][f"{name}.sent_bytes"],
            unit="B/layer",
            reference=bytes_formula(variant, tokens, 0),
            reference_name="formula",
        )
        for variant, name in (("pass_kv", "kv"), ("pass_q", "q"))
    ]
    transfer_s = slowest(ranks, "link.link_s")
    figures.append(
        Figure(
            key=f"{label}: pass-kv, transfer hidden behind attention",
            value=1.0 - slowest(ranks, "kv.exposed_s") / transfer_s,
            unit="share",
            target=HIDDEN_TARGET,
        )
    )
    figures.append(
        Figure(
            key=f"{label}: attention, zigzag against plain sharding",
            value=1.0 / slowest(ranks, "kv.ring_s"),
            unit="layers/s",
            reference=1.0 / slowest(ranks, "plain.ring_s"),
            reference_name="plain",
        )
    )
    return figures


def crossover(chunks: list[int], q_minus_kv: Callable[[int], float]) -> float:
    """New tokens up to which pass-Q is ahead, linear between the chunks that were tried; 0: nowhere."""
    if q_minus_kv(chunks[0]) >= 0.0:
        return 0.0
    for left, right in pairwise(chunks):
        a, b = q_minus_kv(left), q_minus_kv(right)
        if b >= 0.0:
            return left + (right - left) * a / (a - b)
    return chunks[-1]


def pass_figures(chunks: list[int], cached: int, picture: Path | None) -> list[Figure]:
    """Both variants over chunk sizes, and where the rule and the clock say that they cross."""
    cases = [
        [f"{variant}{num_new}", "ring", str(num_new), str(cached), variant, "zigzag"]
        for num_new in chunks
        for variant in VARIANTS
    ]
    # What a KV shard of the cached prefix weighs, and a message of next to nothing.
    hop_bytes = int(bytes_formula("pass_kv", 0, cached))
    cases += [["hop", "link", str(hop_bytes)], ["tiny", "link", "64"]]
    ranks = run_ranks("benchmarks.ring_rank", 2, {"cases": cases})
    [alone] = run_ranks(
        "benchmarks.ring_rank",
        1,
        {"cases": [["alone", "ring", str(chunks[-1]), str(cached), "pass_kv", "zigzag"]]},
    )
    pairs = chunks[-1] * cached + chunks[-1] * (chunks[-1] + 1) / 2
    tiny_s = slowest(ranks, "tiny.link_s")
    rates = RingRates(
        attention_flops_per_s=4.0 * HEADS * HEAD_DIM * pairs / alone["alone.ring_s"],
        link_bytes_per_s=hop_bytes / max(1e-9, slowest(ranks, "hop.link_s") - tiny_s),
        message_s=tiny_s,
        taken_share=min(1.0, max(0.0, slowest(ranks, "hop.taken_s") / slowest(ranks, "hop.link_s"))),
    )
    taken = {variant: {n: slowest(ranks, f"{variant}{n}.ring_s") for n in chunks} for variant in VARIANTS}
    costs = {
        variant: {n: ring_cost(variant, [(n, cached)], SHAPE, 2, rates) for n in chunks}
        for variant in ("pass_kv", "pass_q")
    }
    figures = [
        Figure(key="attention, measured for the rule", value=rates.attention_flops_per_s / 1e9, unit="GFLOP/s"),
        Figure(key="link, measured for the rule", value=rates.link_bytes_per_s / 1e9, unit="GB/s"),
        Figure(key="of a transfer's time taken from attention", value=rates.taken_share, unit="share"),
    ]
    figures += [
        Figure(
            key=f"{n} new after {cached // 1024}k cached: pass-q against pass-kv",
            value=taken["pass_q"][n] * 1e3,
            unit="ms/layer",
            reference=taken["pass_kv"][n] * 1e3,
            reference_name="pass-kv",
            higher_is_better=False,
        )
        for n in chunks
    ]
    rule = PassRule("auto", SHAPE, 2, rates)
    figures.append(
        Figure(
            key="the rule's choice against the faster variant, worst chunk",
            value=max(
                taken[rule.choose_chunks([(n, cached)])][n] / min(taken[variant][n] for variant in VARIANTS)
                for n in chunks
            ),
            unit="ratio",
            higher_is_better=False,
        )
    )
    measured = crossover(chunks, lambda n: taken["pass_q"][n] - taken["pass_kv"][n])
    grid = sorted({*range(1, chunks[-1] + 1, 4)})
    predicted = crossover(
        grid,
        lambda n: (
            ring_cost("pass_q", [(n, cached)], SHAPE, 2, rates).exposed_s
            - ring_cost("pass_kv", [(n, cached)], SHAPE, 2, rates).exposed_s
        ),
    )
    figures.append(
        Figure(
            key=f"pass-q is ahead up to, after {cached // 1024}k cached",
            value=measured,
            unit="new tokens",
            reference=predicted or None,
            reference_name="rule",
        )
    )
    if picture is not None:
        draw(
            picture, chunks, cached, taken, {v: [c.attention_s + c.exposed_s for c in costs[v].values()] for v in costs}
        )
    return figures


def draw(
    picture: Path, chunks: list[int], cached: int, taken: dict[str, dict[int, float]], predicted: dict[str, list[float]]
) -> None:
    series = []
    for variant, colour in (("pass_kv", "#1f6feb"), ("pass_q", "#d1242f")):
        name = variant.replace("_", "-")
        points = [(float(n), taken[variant][n] * 1e3) for n in chunks]
        series.append(Series(name=f"{name}, measured", colour=colour, points=points))
        model = [(float(n), s * 1e3) for n, s in zip(chunks, predicted[variant], strict=True)]
        series.append(Series(name=f"{name}, cost rule", colour=colour, points=model, dashed=True))
    picture.write_text(
        line_chart(
            series,
            title=f"One layer's ring attention on 2 ranks behind {cached:,} cached tokens",
            x_label="new tokens",
            y_label="ms",
        )
    )


def slowest(ranks: list[Figures], key: str) -> float:
    return max(rank[key] for rank in ranks)


def main() -> int:
    parser = option_parser("ring", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw pass-Q against pass-KV as SVG")
    parsed = parser.parse_args()
    options = Options(quick=parsed.quick, json=parsed.json)
    sizes = [2048, SPEED_UP_TOKENS] if options.quick else [2048, 4096, SPEED_UP_TOKENS, 16384]
    chunks = [16, 128, 1024] if options.quick else [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    figures = prefill_figures(sizes)
    figures += ring_figures(SPEED_UP_TOKENS)
    figures += pass_figures(chunks, 16384, parsed.picture)
    return report("ring", figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
