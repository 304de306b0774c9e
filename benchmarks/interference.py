"""What splitting buys: inter-token latency of running decodes while long prompts arrive.

Four requests decode; after a quiet spell, prompts of 2,000 tokens arrive one after the other. The figure is
the p99 of the four's inter-token times while prompts are computed, over the p99 of the quiet spell. The peer is
a colocated worker on the same two cores, in the same run.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from dataclasses import dataclass

from anabranch.config.topology import PoolConfig, Pools, Topology
from anabranch_client import AsyncClient
from benchmarks.load import Answer, ask, quantile, random_prompt
from benchmarks.report import Figure, parse_options, report
from launch.cluster import LocalCluster

NUM_DECODES = 4
PROMPT_TOKENS = 2000
TARGET = 1.5
SETTLE_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class Interference:
    """Inter-token times in seconds, all four decodes together."""

    quiet_s: list[float]
    busy_s: list[float]


def topologies(model: str) -> dict[str, Topology]:
    first, second = (sorted(os.sched_getaffinity(0)) * 2)[:2]
    split = Pools(
        prefill=PoolConfig(threads=1, cores=(first,), max_step_tokens=512),
        decode=PoolConfig(threads=1, cores=(second,)),
    )
    colocated = Pools(colocated=PoolConfig(threads=2, max_step_tokens=512))
    return {
        "split": Topology(model=model, dtype="bfloat16", pools=split),
        "colocated": Topology(model=model, dtype="bfloat16", pools=colocated),
    }


async def measure(endpoint: str, quiet_s: float, num_prompts: int) -> Interference:
    """Run the scenario once against one endpoint."""
    rng = random.Random(1)
    async with AsyncClient(endpoint) as client:
        vocab_size = (await client.model()).vocab_size
        await ask(client, random_prompt(rng, 64, vocab_size), 4)
        answers = [Answer(sent_s=time.perf_counter()) for _ in range(NUM_DECODES)]
        running = [
            asyncio.create_task(ask(client, random_prompt(rng, 32, vocab_size), 6000, answer)) for answer in answers
        ]
        async with asyncio.timeout(120.0):
            while any(len(answer.token_s) < SETTLE_TOKENS for answer in answers):
                await asyncio.sleep(0.05)
        start_s = time.perf_counter()
        await asyncio.sleep(quiet_s)
        middle_s = time.perf_counter()
        for _ in range(num_prompts):
            await ask(client, random_prompt(rng, PROMPT_TOKENS, vocab_size), 1)
        stop_s = time.perf_counter()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return Interference(
        quiet_s=[gap for answer in answers for gap in answer.gaps_between_s(start_s, middle_s)],
        busy_s=[gap for answer in answers for gap in answer.gaps_between_s(middle_s, stop_s)],
    )


def main() -> int:
    options = parse_options("interference", __doc__)
    figures: list[Figure] = []
    for name, topology in topologies("smollm2-135m").items():
        with LocalCluster(topology) as cluster:
            result = asyncio.run(
                measure(cluster.endpoint, 4.0, 4) if options.quick else measure(cluster.endpoint, 10.0, 12)
            )
        for share in (0.5, 0.99):
            figures.append(
                Figure(
                    key=f"{name}_itl_p{share * 100:.0f}",
                    value=quantile(result.busy_s, share) * 1e3,
                    unit="ms",
                    reference=quantile(result.quiet_s, share) * 1e3,
                    reference_name="quiet",
                    target=TARGET if name == "split" and share == 0.99 else None,
                    higher_is_better=False,
                )
            )
    return report("interference", figures, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
