"""The price of splitting: time to first token of a prefill and a decode worker over that of a colocated one.

Each worker is pinned to one core of its own. Both clusters are up at once and asked in turn, so that they
see the same machine; prompts are random, so that no prefix cache helps. Reference: the colocated worker.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics

from anabranch.config.topology import PoolConfig, Pools, Topology
from anabranch_client import AsyncClient
from benchmarks.load import ask, random_prompt
from benchmarks.report import Figure, option_parser, parse_options, report
from launch.cluster import LocalCluster

LENGTHS = (256, 1024, 3072)
TARGET = 1.10


def topologies(model: str, transport: str) -> tuple[Topology, Topology]:
    """A colocated worker on one core, and a split pair on one core each."""
    first, second = (sorted(os.sched_getaffinity(0)) * 2)[:2]

    def pool(core: int) -> PoolConfig:
        return PoolConfig(threads=1, cores=(core,), kv_cache_bytes=512 << 20, max_step_tokens=512)

    colocated = Topology(model=model, dtype="bfloat16", pools=Pools(colocated=pool(first)))
    split = Topology(
        model=model,
        dtype="bfloat16",
        kv_transport="auto" if transport == "auto" else "tcp" if transport == "tcp" else "ucx",
        pools=Pools(prefill=pool(first), decode=pool(second)),
    )
    return colocated, split


async def measure(colocated: str, split: str, rounds: int) -> list[Figure]:
    """Ask both endpoints in turn; medians of the time to first token."""
    rng = random.Random(0)
    figures: list[Figure] = []
    async with AsyncClient(colocated) as alone, AsyncClient(split) as pair:
        vocab_size = (await alone.model()).vocab_size
        for length in LENGTHS:
            times: dict[str, list[float]] = {"colocated": [], "split": []}
            overlaps: list[float] = []
            for turn in range(rounds + 1):
                prompt = random_prompt(rng, length, vocab_size)
                for name, client in (("colocated", alone), ("split", pair)):
                    answer = await ask(client, prompt, 2)
                    if turn:  # the first round warms up
                        times[name].append(answer.ttft_s)
                        if answer.finished is not None and answer.finished.kv is not None:
                            overlaps.append(answer.finished.kv.overlap)
            figures.append(
                Figure(
                    key=f"ttft_{length}",
                    value=statistics.median(times["split"]) * 1e3,
                    unit="ms",
                    reference=statistics.median(times["colocated"]) * 1e3,
                    reference_name="colocated",
                    target=TARGET,
                    higher_is_better=False,
                )
            )
            figures.append(Figure(key=f"kv_overlap_{length}", value=statistics.median(overlaps), unit="share hidden"))
    return figures


def main() -> int:
    parser = option_parser("split_tax", __doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--transport", default="auto", choices=["auto", "ucx", "tcp"])
    parsed = parser.parse_args()
    options = parse_options("split_tax", __doc__, parser)
    colocated, split = topologies(parsed.model, parsed.transport)
    with LocalCluster(colocated) as alone, LocalCluster(split) as pair:
        figures = asyncio.run(measure(alone.endpoint, pair.endpoint, 3 if options.quick else 9))
    return report("split_tax", figures, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
