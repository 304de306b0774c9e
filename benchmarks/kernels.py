"""The CPU kernels on SmolLM2-135M's shapes: bytes per second of products and of attention, against their bounds.

Products with few rows are bound by reading the weights, so their figure is GB/s of weights over the GB/s at
which this machine reads memory, measured in the same run; the GB/s of PyTorch's own product stand beside it.
Attention is timed against `scaled_dot_product_attention` on contiguous tensors.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from anabranch.cache.paged_kv import PagedKv
from anabranch.kernels.base import Kernels
from anabranch.kernels.native import select_kernels
from anabranch.step.batch import ForwardBatch
from anabranch.step.plan import SequencePlan, StepPlan
from benchmarks.report import Figure, parse_options, report

NUM_LAYERS = 30
LINEAR_SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
HEAD_SHAPE = (49152, 576)
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 16
ROWS = (1, 4, 16, 32, 64, 128, 512, 2048)
# Beyond so many rows a product is bound by arithmetic: its figure is GFLOP/s.
MAX_STREAMED_ROWS = 64
READ_TARGET = 0.85
DTYPE = torch.bfloat16
CPU = torch.device("cpu")


def median_s(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of `work`, after one run that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def read_bandwidth(repeats: int) -> float:
    """GB/s at which all threads together read memory: the best of PyTorch's sum and of a matrix-vector product."""
    numbers = torch.ones(70_000_000)
    matrix, vector = numbers.view(-1, 10_000), torch.ones(10_000)
    ways: tuple[Callable[[], object], ...] = (numbers.sum, lambda: matrix @ vector)
    return max(numbers.nbytes / median_s(way, repeats) for way in ways) / 1e9


def linear_figures(kernels: Kernels, read_gbs: float, repeats: int, rows: Sequence[int]) -> list[Figure]:
    """All products of a forward pass, each with weights of its own, so that no cache holds them."""
    shapes = [shape for _ in range(NUM_LAYERS) for shape in LINEAR_SHAPES]
    weights = [torch.randn(shape).to(DTYPE) for shape in [*shapes, HEAD_SHAPE]]
    figures = []
    for num_rows in rows:
        inputs = {channels: torch.randn(num_rows, channels).to(DTYPE) for _, channels in LINEAR_SHAPES}
        # A prompt's rows do not pass the head; a decode step's all do.
        used = weights if num_rows <= MAX_STREAMED_ROWS else weights[:-1]

        def ours(inputs: dict[int, torch.Tensor] = inputs, used: list[torch.Tensor] = used) -> None:
            for weight in used:
                kernels.linear(inputs[weight.shape[1]], weight, None)

        def theirs(inputs: dict[int, torch.Tensor] = inputs, used: list[torch.Tensor] = used) -> None:
            for weight in used:
                functional.linear(inputs[weight.shape[1]], weight)

        ours_s, theirs_s = median_s(ours, repeats), median_s(theirs, repeats)
        num_bytes = sum(weight.nbytes for weight in used)
        if num_rows <= MAX_STREAMED_ROWS:
            gbs = num_bytes / ours_s / 1e9
            target = READ_TARGET if num_rows == 1 else None
            figures.append(
                Figure(
                    key=f"linear_{num_rows}_of_read",
                    value=gbs,
                    unit="GB/s",
                    reference=read_gbs,
                    reference_name="reading",
                    target=target,
                )
            )
            work, unit = num_bytes, "GB/s"
        else:
            work, unit = num_bytes * num_rows, "GFLOP/s"
        figures.append(
            Figure(
                key=f"linear_{num_rows}",
                value=work / ours_s / 1e9,
                unit=unit,
                reference=work / theirs_s / 1e9,
                reference_name="F.linear",
            )
        )
    return figures


def make_batch(num_new: int, context_len: int, batch_size: int) -> tuple[PagedKv, ForwardBatch]:
    """Sequences of one length over a pool with random contents."""
    blocks = -(-context_len // BLOCK_SIZE)
    order = torch.randperm(blocks * batch_size).tolist()
    sequences = tuple(
        SequencePlan(
            request_id=str(index),
            epoch=0,
            token_ids=(0,) * num_new,
            start=context_len - num_new,
            block_ids=tuple(order[index * blocks : (index + 1) * blocks]),
        )
        for index in range(batch_size)
    )
    kv = PagedKv(
        num_layers=NUM_LAYERS,
        num_blocks=blocks * batch_size,
        block_size=BLOCK_SIZE,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=DTYPE,
        device=CPU,
    )
    kv.data.normal_()
    return kv, ForwardBatch.from_plan(StepPlan(step=0, sequences=sequences), BLOCK_SIZE, CPU)


def attention_figure(kernels: Kernels, num_new: int, context_len: int, batch_size: int, repeats: int) -> Figure:
    """Attention of all layers over a paged cache, in ms, against PyTorch's over contiguous K and V."""
    kv, batch = make_batch(num_new, context_len, batch_size)
    q_THD = torch.randn(batch.num_tokens, NUM_HEADS, HEAD_DIM).to(DTYPE)
    q_BHTD = q_THD.view(batch_size, num_new, NUM_HEADS, HEAD_DIM).transpose(1, 2)
    shape = (NUM_LAYERS, 2, batch_size, NUM_KV_HEADS, context_len, HEAD_DIM)
    contiguous = kv.data.flatten(2, 3)[:, :, : batch_size * context_len].reshape(shape).clone()

    def ours() -> None:
        for layer in range(NUM_LAYERS):
            kernels.paged_attention(q_THD, kv.layer(layer), batch, HEAD_DIM**-0.5, None)

    def theirs() -> None:
        for k_BKCD, v_BKCD in contiguous:
            functional.scaled_dot_product_attention(
                q_BHTD, k_BKCD, v_BKCD, is_causal=num_new == context_len, enable_gqa=True
            )

    kind = "decode" if num_new == 1 else "prefill"
    return Figure(
        key=f"{kind}_attention_{batch_size}x{context_len}",
        value=median_s(ours, repeats) * 1e3,
        unit="ms",
        reference=median_s(theirs, repeats) * 1e3,
        reference_name="sdpa",
        higher_is_better=False,
    )


def main() -> int:
    options = parse_options("kernels", __doc__)
    repeats = 5 if options.quick else 15
    rows = [n for n in ROWS if n <= 512] if options.quick else list(ROWS)
    kernels = select_kernels(CPU, DTYPE)
    read_gbs = read_bandwidth(repeats)
    figures = [
        Figure(key="read", value=read_gbs, unit="GB/s"),
        *linear_figures(kernels, read_gbs, repeats, rows),
    ]
    attention = [(1, 512, 1), (1, 512, 16), (1, 512, 32), (512, 512, 1), (2048, 2048, 1)]
    if not options.quick:
        attention += [(1, 8192, 1), (4096, 4096, 1)]
    figures += [attention_figure(kernels, *sizes, repeats=3 if sizes[0] > 1 else repeats) for sizes in attention]
    return report("kernels", figures, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
