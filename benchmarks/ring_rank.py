"""One rank of `benchmarks.ring`: prefill passes, ring attention alone, and the link alone, timed."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import cast

import torch

from anabranch.attention.cp_batch import RingBatch
from anabranch.attention.paged import PagedAttention
from anabranch.attention.ring import RingAttention, Variant
from anabranch.attention.ring_geometry import RingGeometry
from anabranch.cache.paged_kv import PagedKv
from anabranch.kernels.native import select_kernels
from anabranch.model.attention import Attention
from anabranch.parallel.exchange import Exchange, Handle
from anabranch.parallel.placement import BlockCyclic
from anabranch.parallel.zigzag import piece, zigzag_share
from anabranch.step.batch import ForwardBatch
from anabranch.step.plan import SequencePlan, StepPlan
from benchmarks.counting import CountingExchange
from benchmarks.random_model import HEAD_DIM, HEADS, KV_HEADS, random_model
from benchmarks.ranks import Figures, Task
from transport.collectives.shm import ShmGroup

BLOCK_SIZE = 16
DTYPE = torch.bfloat16
CPU = torch.device("cpu")
SCALE = HEAD_DIM**-0.5
MIN_REPEATS, MAX_REPEATS, REPEAT_S = 3, 50, 1.5
WATCHED_REPEATS = 8
LINK_REPEATS, EVICTING_BYTES, COMPUTE_SIZE = 15, 64 << 20, 1024


class TimedAttention:
    """Adds up the time that attention takes, its transfers included."""

    def __init__(self, inner: Attention) -> None:
        self._inner = inner
        self.taken_s = 0.0

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Attention.attend`."""
        start = time.perf_counter()
        result = self._inner.attend(layer, q_THD, k_TKD, v_TKD, scale, window)
        self.taken_s += time.perf_counter() - start
        return result


class WatchedExchange(CountingExchange):
    """Adds up the time that a rank waits for bytes once all ranks have computed.

    Before each wait the ranks meet, so that what is measured is the transfer and not a rank that is late.
    """

    def __init__(self, group: ShmGroup) -> None:
        super().__init__(group)
        self._group = group
        self.exposed_s = 0.0

    def post(self, send: Sequence[torch.Tensor], to: int, receive: Sequence[torch.Tensor], source: int) -> Handle:
        """See `Exchange.post`."""
        return _WatchedHandle(self, super().post(send, to, receive, source))

    def wait_for(self, handle: Handle) -> None:
        self._group.barrier()
        start = time.perf_counter()
        handle.wait()
        self.exposed_s += time.perf_counter() - start


class _WatchedHandle:
    def __init__(self, exchange: WatchedExchange, inner: Handle) -> None:
        self._exchange = exchange
        self._inner = inner

    def wait(self) -> None:
        """See `Handle.wait`."""
        self._exchange.wait_for(self._inner)


def make_plan(num_new: int, cached: int, cp: int) -> StepPlan:
    spans = -(-(num_new + cached) // (BLOCK_SIZE * cp))
    sequence = SequencePlan(
        request_id="0", epoch=0, token_ids=(1,) * num_new, start=cached, block_ids=tuple(range(spans))
    )
    return StepPlan(step=0, sequences=(sequence,))


def make_pool(plan: StepPlan, num_layers: int) -> PagedKv:
    return PagedKv(
        num_layers=num_layers,
        num_blocks=len(plan.sequences[0].block_ids),
        block_size=BLOCK_SIZE,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=DTYPE,
        device=CPU,
    )


def plain_share(tokens: range, cp: int, rank: int) -> tuple[range, range]:
    """Consecutive tokens, as two pieces: what zigzag is measured against."""
    return piece(tokens, cp, 2 * rank), piece(tokens, cp, 2 * rank + 1)


def make_batch(plan: StepPlan, exchange: Exchange, sharding: str) -> RingBatch:
    placement = BlockCyclic(block_size=BLOCK_SIZE, cp=exchange.size)
    share_of = plain_share if sharding == "plain" else zigzag_share
    return RingBatch.from_geometry(RingGeometry(plan, placement, CPU, share_of), exchange.rank)


def repeat_s(run: Callable[[], object], group: ShmGroup) -> float:
    """Shortest time of a run on this rank; all ranks start each run together and do as many."""
    run()
    group.barrier()
    start = time.perf_counter()
    run()
    once_s = group.all_reduce(torch.tensor([time.perf_counter() - start], dtype=torch.float64)).item() / group.size
    taken = []
    for _ in range(max(MIN_REPEATS, min(MAX_REPEATS, int(REPEAT_S / once_s)))):
        group.barrier()
        start = time.perf_counter()
        run()
        group.barrier()
        taken.append(time.perf_counter() - start)
    return min(taken)


def prefill(group: ShmGroup, num_tokens: int, num_layers: int) -> Figures:
    """A fresh prompt through all layers: time, attention's share of it, and how far memory rises."""
    kernels = select_kernels(CPU, DTYPE)
    model = random_model(num_layers, DTYPE, kernels)
    plan = make_plan(num_tokens, 0, group.size)
    taken: list[tuple[float, float]] = []

    def run() -> None:
        pool = make_pool(plan, num_layers)
        if group.size == 1:
            paged = ForwardBatch.from_plan(plan, BLOCK_SIZE, CPU)
            ids, positions, inner = (
                paged.token_ids_T,
                paged.positions_T,
                cast(Attention, PagedAttention(kernels, pool, paged)),
            )
        else:
            batch = make_batch(plan, group, "zigzag")
            ids, positions, inner = (
                batch.token_ids_T,
                batch.positions_T,
                RingAttention(kernels, pool, batch, group, "pass_kv"),
            )
        attention = TimedAttention(inner)
        start = time.perf_counter()
        model.run(model.attention.forward(ids, positions, attention, torch.empty(0, dtype=torch.int64)))
        taken.append((time.perf_counter() - start, attention.taken_s))

    before = reset_peak_bytes()
    run()
    peak_bytes = read_peak_bytes() - before
    for _ in range(2):
        group.barrier()
        run()
    best = min(taken)
    return {"prefill_s": best[0], "attention_s": best[1], "peak_bytes": peak_bytes}


def ring(group: ShmGroup, num_new: int, cached: int, variant: Variant, sharding: str) -> Figures:
    """One layer's ring: time, bytes sent, and with all ranks in step, the transfer time that shows."""
    plan = make_plan(num_new, cached, group.size)
    kernels = select_kernels(CPU, DTYPE)
    pool = make_pool(plan, 1)
    batch = make_batch(plan, group, sharding)
    generator = torch.Generator().manual_seed(group.rank)
    q, k, v = (
        torch.randn(batch.num_tokens, heads, HEAD_DIM, generator=generator).to(DTYPE)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )

    def attention(exchange: Exchange) -> Callable[[], object]:
        rings = RingAttention(kernels, pool, batch, exchange, variant)
        return lambda: rings.attend(0, q, k, v, SCALE, None)

    taken_s = repeat_s(attention(group), group)
    watched = WatchedExchange(group)
    run = attention(watched)
    exposed = []
    for _ in range(WATCHED_REPEATS):
        watched.exposed_s = 0.0
        watched.sent_bytes_to.clear()
        run()
        exposed.append(watched.exposed_s)
    # The first fills fresh buffers.
    return {"ring_s": taken_s, "exposed_s": median(exposed[1:]), "sent_bytes": watched.sent_bytes}


def link(group: ShmGroup, num_bytes: int) -> Figures:
    """A transfer to the next rank and from the one before: alone, and what it takes from computing beside it.

    Caches are emptied before each, as attention would have done.
    """
    send = torch.zeros(num_bytes, dtype=torch.uint8)
    receive = group.buffer_like(send)
    following, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    evicting = torch.zeros(EVICTING_BYTES, dtype=torch.uint8)
    factor = torch.randn(COMPUTE_SIZE, COMPUTE_SIZE).to(DTYPE)
    alone: list[float] = []
    with_link: list[float] = []
    without: list[float] = []
    for i in range(3 * LINK_REPEATS):
        evicting.fill_(i % 7)
        group.barrier()
        start = time.perf_counter()
        handle = None if i % 3 == 2 else group.post([send], following, [receive], before)
        if i % 3 > 0:
            torch.mm(factor, factor)
            (with_link if i % 3 == 1 else without).append(time.perf_counter() - start)
        if handle is not None:
            handle.wait()
        if i % 3 == 0:
            alone.append(time.perf_counter() - start)
    return {"link_s": median(alone), "taken_s": median(with_link) - median(without)}


def reset_peak_bytes() -> int:
    """Let the kernel's high-water mark start from the memory that is in use now; gives that."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return read_peak_bytes()


def read_peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def rank_main(group: ShmGroup, task: Task) -> Figures:
    """All cases of a task: `{"cases": [[name, kind, ...]]}`; figures are named `name.figure`."""
    figures: Figures = {}
    for name, kind, *rest in cast("list[list[str]]", task["cases"]):
        if kind == "prefill":
            found = prefill(group, int(rest[0]), int(rest[1]))
        elif kind == "ring":
            found = ring(group, int(rest[0]), int(rest[1]), cast(Variant, rest[2]), rest[3])
        else:
            found = link(group, int(rest[0]))
        figures |= {f"{name}.{key}": value for key, value in found.items()}
    return figures
