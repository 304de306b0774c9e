"""The GPU's attention kernels and the engine on a GPU, each against its peer or bound.

Attention: FlexAttention over the pool in place, by block size, against the plain kernels; decode steps also
against the bytes of K and V that they must read at the memory bandwidth measured here. The engine: prompt tokens
per second and tokens per second of a model, against transformers on the same GPU. Everything is timed with the
device synchronised before and after.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from anabranch.cache.paged_kv import LayerKv, PagedKv
from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import build_engine
from anabranch.errors import AnabranchError
from anabranch.kernels.base import Kernels
from anabranch.kernels.native import select_kernels
from anabranch.kernels.plain import PlainKernels
from anabranch.model.sources import resolve_model
from anabranch.step.batch import ForwardBatch
from anabranch.step.plan import SequencePlan, StepPlan
from benchmarks.engine import run_engine
from benchmarks.report import Figure, option_parser, parse_options, report

DTYPE = torch.bfloat16
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
BLOCK_SIZES = (16, 64, 128)
# Name -> (sequences, new tokens, context) of an attention call.
SHAPES = {
    "decode_1x8192": (1, 1, 8192),
    "decode_32x2048": (32, 1, 2048),
    "prompt_2048": (1, 2048, 2048),
    "chunk_512_of_8192": (1, 512, 8192),
}
PROMPT_LENGTHS = (512, 2048)
BATCHES = (1, 16, 64)
DECODE_CONTEXT = 128


def seconds(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of one call, after two that warm up."""
    times_s = []
    for turn in range(repeats + 2):
        _synchronise(device)
        start_s = time.perf_counter()
        action()
        _synchronise(device)
        if turn >= 2:
            times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second that a sum reads."""
    data = torch.ones(num_bytes // 4, device=device)
    return num_bytes / seconds(data.sum, device, 5)


def attention_case(
    name: str, block_size: int, device: torch.device, shrink: int
) -> tuple[torch.Tensor, LayerKv, ForwardBatch]:
    """Queries, a pool and a batch of a shape, its blocks shuffled; lengths divided by `shrink`."""
    count, num_new, context_len = SHAPES[name]
    context_len //= shrink
    num_new = max(1, num_new // shrink)
    width = -(-context_len // block_size)
    blocks = iter(torch.randperm(count * width, generator=torch.Generator().manual_seed(0)).tolist())
    sequences = tuple(
        SequencePlan(
            request_id=str(index),
            epoch=0,
            token_ids=(0,) * num_new,
            start=context_len - num_new,
            block_ids=tuple(next(blocks) for _ in range(width)),
        )
        for index in range(count)
    )
    pool = PagedKv(
        num_layers=1,
        num_blocks=count * width,
        block_size=block_size,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=DTYPE,
        device=device,
    )
    pool.data.normal_()
    batch = ForwardBatch.from_plan(StepPlan(step=0, sequences=sequences), block_size, device)
    return torch.randn(count * num_new, NUM_HEADS, HEAD_DIM, dtype=DTYPE, device=device), pool.layer(0), batch


@torch.inference_mode()
def attention_figures(kernels: Kernels, device: torch.device, repeats: int, shrink: int) -> list[Figure]:
    """Times of one layer's attention; without the batch's plan, which the layers of a step share."""
    peak = bandwidth(device, (1 << 30) // shrink)
    figures = []
    for name in SHAPES:
        for block_size in BLOCK_SIZES:
            q, kv, batch = attention_case(name, block_size, device, shrink)
            arguments = (q, kv, batch, HEAD_DIM**-0.5, None)
            ours_s = seconds(partial(kernels.paged_attention, *arguments), device, repeats)
            plain_s = seconds(partial(PlainKernels().paged_attention, *arguments), device, repeats)
            key = f"{name}_block_{block_size}"
            figures.append(
                Figure(key=key, value=1 / ours_s, unit="calls/s", reference=1 / plain_s, reference_name="plain")
            )
            if name.startswith("decode"):
                read = 2 * sum(batch.context_lens) * NUM_KV_HEADS * HEAD_DIM * DTYPE.itemsize
                figures.append(
                    Figure(
                        key=f"{key}_bandwidth",
                        value=read / ours_s / 1e9,
                        unit="GB/s",
                        reference=peak / 1e9,
                        reference_name="reading",
                    )
                )
    return figures


@torch.inference_mode()
def peer_times(model: torch.nn.Module, prompts: list[list[int]], max_tokens: int) -> tuple[float, list[float]]:
    """Seconds of transformers to all first tokens, and of each decode step after that."""
    device = next(model.parameters()).device
    ids = torch.tensor(prompts, device=device)
    cache = DynamicCache(config=model.config)
    times_s = []
    for _ in range(max_tokens):
        _synchronise(device)
        start_s = time.perf_counter()
        ids = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        _synchronise(device)
        times_s.append(time.perf_counter() - start_s)
    return times_s[0], times_s[1:]


def engine_figures(name: str, device: torch.device, quick: bool) -> list[Figure]:
    """The engine on a model against transformers."""
    config = WorkerConfig(
        role="colocated",
        name="bench",
        orchestrator="",
        model=name,
        dtype="bfloat16",
        device=str(device),
        kv_cache_bytes=(1 if quick else 4) << 30,
    )
    engine = build_engine(config)
    folder = resolve_model(name).path
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE, trust_remote_code=False).eval().to(device)
    rng = random.Random(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[rng.randrange(engine.model_config.vocab_size) for _ in range(length)] for _ in range(count)]

    figures = []
    steps = 16 if quick else 48
    for length in PROMPT_LENGTHS:
        pairs = [(run_engine(engine, batch, 1)[0], peer_times(peer, batch, 1)[0]) for batch in [prompts(1, length)] * 4]
        ours_s, theirs_s = (statistics.median(times) for times in zip(*pairs[1:], strict=True))
        figures.append(_against(f"prefill_{length}", length / ours_s, length / theirs_s))
    for size in BATCHES[:2] if quick else BATCHES:
        batch = prompts(size, DECODE_CONTEXT)
        run_engine(engine, batch, 4)  # compiles what this batch needs
        ours_s = statistics.median(run_engine(engine, batch, steps)[1])
        theirs_s = statistics.median(peer_times(peer, batch, steps)[1])
        figures.append(_against(f"decode_batch_{size}", size / ours_s, size / theirs_s))
    return figures


def _against(key: str, ours: float, theirs: float) -> Figure:
    return Figure(key=key, value=ours, unit="tok/s", reference=theirs, reference_name="transformers")


def main() -> int:
    parser = option_parser("gpu", __doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--attention-only", action="store_true", help="leave the engine out")
    parsed = parser.parse_args()
    options = parse_options("gpu", __doc__, parser)
    device = torch.device(parsed.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible here: nothing is measured")
        return 0
    shrink = 1 if device.type == "cuda" else 64
    kernels = select_kernels(device, DTYPE)
    figures = attention_figures(kernels, device, 5 if options.quick else 20, shrink)
    if not parsed.attention_only:
        try:
            figures += engine_figures(parsed.model, device, options.quick)
        except AnabranchError as error:
            print(f"the engine is not measured: {error}", file=sys.stderr)
    return report("gpu", figures, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
