"""Tree attention in decode against ring and gather: bytes and rounds by formula, latency at CP 2.

One layer of SmolLM2-135M's attention (9 query heads, 3 KV heads, head dim 64, bfloat16), one new token per
sequence. Four ways, all exact and the same bits on every rank:

    tree     packed (max, denominator, numerator) parts, recursive doubling
    scatter  the same parts, reduce-scatter and all-gather: the fewest bytes, the paper's V_tree
    gather   the same parts, every rank to every rank
    ring     KV shards travel, as in ring attention: the paper's V_ring

Bytes and rounds are counted at CP 2 to 8 with contexts of 1k to 128k tokens; the target is the formula, not a byte
more. Latency is of a whole layer step on two processes of one thread each, and of one process; the contexts from
which the tree is faster than the ring, and than one process, are named at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import cast

import torch

from anabranch.attention.cp_batch import TreeBatch
from anabranch.attention.tree import TreeAttention
from anabranch.attention.tree_reduce import Reduction, TreeReduction
from anabranch.cache.paged_kv import PagedKv
from anabranch.kernels.base import Kernels
from anabranch.kernels.native import select_kernels
from anabranch.model.attention import Attention
from anabranch.parallel.exchange import Exchange
from anabranch.parallel.threads import ThreadGroup
from anabranch.parallel.threads import run_ranks as run_threads
from anabranch.step.plan import SequencePlan, StepPlan
from benchmarks.counting import CountingExchange
from benchmarks.ranks import Figures, Task, run_ranks
from benchmarks.reductions import GatherReduction, ScatterReduction, num_rounds
from benchmarks.report import Figure, parse_options, report
from benchmarks.ring_decode import RingDecode
from transport.collectives.shm import ShmGroup

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 16
DTYPE = torch.bfloat16
CPU = torch.device("cpu")
WAYS = ("tree", "scatter", "gather", "ring")
SECONDS_PER_CASE = 0.6


def make_plan(batch: int, context: int, cp: int) -> StepPlan:
    """`batch` sequences, each with one new token at the end of `context`."""
    spans = -(-context // (BLOCK_SIZE * cp))
    return StepPlan(
        step=0,
        sequences=tuple(
            SequencePlan(
                request_id=str(b),
                epoch=0,
                token_ids=(0,),
                start=context - 1,
                block_ids=tuple(range(b * spans, (b + 1) * spans)),
            )
            for b in range(batch)
        ),
    )


def make_pool(plan: StepPlan) -> PagedKv:
    num_blocks = sum(len(sequence.block_ids) for sequence in plan.sequences)
    pool = PagedKv(
        num_layers=1,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=DTYPE,
        device=CPU,
    )
    pool.data.normal_()
    return pool


def make_attention(way: str, kernels: Kernels, pool: PagedKv, batch: TreeBatch, exchange: Exchange) -> Attention:
    if way == "ring":
        return RingDecode(kernels, pool, batch, exchange)
    reductions: dict[str, Callable[[Exchange], Reduction]] = {
        "tree": TreeReduction,
        "scatter": ScatterReduction,
        "gather": GatherReduction,
    }
    return TreeAttention(kernels, pool, batch, reductions[way](exchange))


def make_step(way: str, plan: StepPlan, exchange: Exchange) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """One rank's layer step, ready to be called again and again."""
    batch = TreeBatch.from_plan(plan, BLOCK_SIZE, exchange.rank, exchange.size, CPU)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch.num_tokens, heads, HEAD_DIM, generator=generator).to(DTYPE)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    attention = make_attention(way, select_kernels(CPU, DTYPE), make_pool(plan), batch, exchange)
    return lambda: attention.attend(0, q, k, v, HEAD_DIM**-0.5, None)


def formula(way: str, batch: int, context: int, cp: int) -> tuple[int, int]:
    """`(bytes sent by all ranks, rounds)` of one layer step. n: bytes of one packed part."""
    n = batch * HEADS * (HEAD_DIM + 2) * 4
    if way == "tree":
        core = 1 << (cp.bit_length() - 1)
        return (core * (core.bit_length() - 1) + 2 * (cp - core)) * n, num_rounds(cp)
    if way == "scatter":
        return 2 * (cp - 1) * n, 2
    if way == "gather":
        return cp * (cp - 1) * n, 1
    return (cp - 1) * batch * context * 2 * KV_HEADS * HEAD_DIM * DTYPE.itemsize, cp - 1


def count(way: str, batch: int, context: int, cp: int) -> tuple[int, int]:
    """The same, counted on ranks as threads."""
    plan = make_plan(batch, context, cp)

    def rank_main(group: ThreadGroup) -> tuple[int, int]:
        exchange = CountingExchange(group)
        make_step(way, plan, exchange)()
        return exchange.sent_bytes, exchange.num_rounds

    results = run_threads(cp, rank_main)
    return sum(sent for sent, _ in results), max(rounds for _, rounds in results)


def rank_main(group: ShmGroup, task: Task) -> Figures:
    """Latency of every case on this rank: the median of what the slowest rank took."""
    figures: Figures = {}
    for case in cast("list[list[int]]", task["cases"]):
        batch, context = case
        plan = make_plan(batch, context, group.size)
        for way in WAYS if group.size > 1 else ("tree",):
            step = make_step(way, plan, group)
            step()
            figures[f"{way} {batch} {context}"] = _median_s(step, group)
    return figures


def _median_s(step: Callable[[], object], group: ShmGroup) -> float:
    """Median latency; the ranks agree on the number of repetitions, or one would wait for the others' calls."""
    group.barrier()
    start = time.perf_counter()
    step()
    once_s = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    mean_s = group.all_reduce(once_s).item() / group.size
    taken = []
    for _ in range(max(5, min(400, int(SECONDS_PER_CASE / mean_s / len(WAYS))))):
        group.barrier()
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]


def counted_figures(degrees: list[int], contexts: list[int], batch: int) -> list[Figure]:
    figures = []
    for way in WAYS:
        for cp in degrees:
            # What parts weigh does not depend on the context: one context is as good as all.
            for context in contexts if way == "ring" else contexts[:1]:
                sent_bytes, rounds = count(way, batch, context, cp)
                want_bytes, want_rounds = formula(way, batch, context, cp)
                key = f"{way}, CP {cp}" + (f", {context_text(context)}" if way == "ring" else ", any context")
                figures.append(
                    Figure(
                        key=f"{key}: bytes, all ranks",
                        value=sent_bytes,
                        unit="B/layer",
                        reference=want_bytes,
                        reference_name="formula",
                        target=1.0,
                        higher_is_better=False,
                    )
                )
                if context == contexts[0]:
                    figures.append(
                        Figure(
                            key=f"{way}, CP {cp}: rounds",
                            value=rounds,
                            unit="rounds/layer",
                            reference=want_rounds,
                            reference_name="formula",
                            target=1.0,
                            higher_is_better=False,
                        )
                    )
    return figures


def latency_figures(contexts_of: dict[int, list[int]]) -> list[Figure]:
    """One layer step by batch and context: the tree at CP 2 against one rank, every way against the ring."""
    cases = [[batch, context] for batch, contexts in contexts_of.items() for context in contexts]
    one = run_ranks("benchmarks.tree", 1, {"cases": cases})[0]
    two = run_ranks("benchmarks.tree", 2, {"cases": cases})
    figures = []
    for batch, context in cases:
        case = f"{batch} {context}"
        label = f"batch {batch}, {context_text(context)}"
        slowest = {way: max(rank[f"{way} {case}"] for rank in two) * 1e6 for way in WAYS}
        figures.append(
            Figure(
                key=f"{label}: tree, CP 2, against one rank",
                value=slowest["tree"],
                unit="us/layer",
                reference=one[f"tree {case}"] * 1e6,
                reference_name="one rank",
                higher_is_better=False,
            )
        )
        figures.extend(
            Figure(
                key=f"{label}: {way}, CP 2",
                value=slowest[way],
                unit="us/layer",
                reference=slowest["ring"],
                reference_name="ring",
                higher_is_better=False,
            )
            for way in WAYS[:-1]
        )
    for batch, contexts in contexts_of.items():
        figures.extend(crossovers(batch, contexts, one, two))
    return figures


def crossovers(batch: int, contexts: list[int], one: Figures, two: list[Figures]) -> list[Figure]:
    """The shortest measured context from which the tree on two ranks stays faster; 0 where there is none."""
    tree = {c: max(rank[f"tree {batch} {c}"] for rank in two) for c in contexts}
    ring = {c: max(rank[f"ring {batch} {c}"] for rank in two) for c in contexts}
    alone = {c: one[f"tree {batch} {c}"] for c in contexts}
    found = []
    for name, other in (("ring", ring), ("one rank", alone)):
        wins = [c for c in contexts if all(tree[d] < other[d] for d in contexts if d >= c)]
        key = f"batch {batch}: tree, CP 2, beats {name} from"
        found.append(Figure(key=key, value=min(wins, default=0), unit="tokens"))
    return found


def context_text(context: int) -> str:
    return f"{context // 1024}k" if context >= 1024 else str(context)


def main() -> int:
    options = parse_options("tree", __doc__)
    degrees = [2, 4] if options.quick else [2, 3, 4, 5, 6, 7, 8]
    counted = [1024, 8192] if options.quick else [1024, 8192, 32768, 131072]
    timed = {1: [64, 1024, 8192, 32768]}
    if not options.quick:
        timed = {1: [64, 256, 1024, 4096, 16384, 65536, 131072], 16: [64, 256, 1024, 4096]}
    torch.set_num_threads(1)
    figures = counted_figures(degrees, counted, batch=1)
    figures += latency_figures(timed)
    return report("tree", figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
