"""The engine alone, in this process, against transformers: prompt tokens per second and tokens per second.

Both compute SmolLM2-135M in bfloat16 on the same threads, in turn. The engine goes through its scheduler, step
plans and sampler; transformers through its forward pass with its default attention and cache. The bound of
decode at batch 1 is the weights read once per token at the memory bandwidth measured here.

`--vllm DIR` and `--llama-cpp DIR` name virtual environments of peers, which decode the same prompts in turn, each
in a process of its own; llama.cpp one prompt at a time, from the GGUF file of `--llama-cpp-gguf`, which should hold
the same model in bfloat16.

The last figures are what recorded decode steps (`step_programs`) bring: the same steps call by call, in turn, on this
model and on a random mixture of experts, whose steps cannot be recorded.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, MixtralConfig, MixtralForCausalLM

from anabranch.cache.kv_manager import KvCacheManager
from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine, build_engine
from anabranch.model.sources import resolve_model
from anabranch.request.request import Request
from anabranch.request.sampling_params import SamplingParams
from anabranch.sampling.stop import StopChecker
from anabranch.schedule.generation import GenerationScheduler
from anabranch.schedule.sequence import Sequence
from benchmarks.peer_process import PeerError, PeerProcess
from benchmarks.report import Figure, option_parser, parse_options, report

PROMPT_LENGTHS = (512, 2048)
BATCHES = (1, 16, 32, 64)
DECODE_CONTEXT = 128
PREFILL_TARGET = 1.2
DECODE_TARGET = 2.5
BOUND_TARGET = 0.7
# Below it at every batch, recording would not be worth its code.
RECORDED_TARGET = 1.1


def run_engine(engine: Engine, prompts: list[list[int]], max_tokens: int) -> tuple[float, list[float]]:
    """Prompts through a colocated scheduler: seconds to all first tokens, and of each decode step after that."""
    cache = KvCacheManager(num_blocks=engine.kv.num_blocks, block_size=engine.kv.block_size, prefix_cache=False)
    scheduler = GenerationScheduler(
        cache,
        StopChecker(max_context=engine.max_context),
        computes_prompts=True,
        max_running=len(prompts),
        max_step_tokens=max(2048, len(prompts)),
    )
    for index, prompt in enumerate(prompts):
        request = Request(
            request_id=str(index),
            epoch=0,
            prompt_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=max_tokens),
        )
        scheduler.add_prompt(Sequence(request))
    start_s = time.perf_counter()
    first_s = 0.0
    steps_s: list[float] = []
    while True:
        begin_s = time.perf_counter()
        decoding = not len(scheduler.prompts)
        plan, _ = scheduler.schedule()
        if plan is None:
            return first_s, steps_s
        scheduler.update(plan, engine.runner.execute(plan))
        now_s = time.perf_counter()
        if decoding:
            steps_s.append(now_s - begin_s)
        else:
            first_s = now_s - start_s


class Peer:
    """transformers, eager, as its users run it."""

    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], max_tokens: int) -> tuple[float, list[float]]:
        """As `run_engine`; all prompts have one length, so transformers pads nothing."""
        ids = torch.tensor(prompts)
        cache = DynamicCache(config=self.model.config)
        start_s = time.perf_counter()
        logits = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        next_ids = logits[:, -1].argmax(-1, keepdim=True)
        first_s = time.perf_counter() - start_s
        steps_s: list[float] = []
        for _ in range(max_tokens - 1):
            begin_s = time.perf_counter()
            logits = self.model(input_ids=next_ids, past_key_values=cache, logits_to_keep=1).logits
            next_ids = logits[:, -1].argmax(-1, keepdim=True)
            steps_s.append(time.perf_counter() - begin_s)
        return first_s, steps_s


def read_bandwidth() -> float:
    """Bytes per second that all threads read from memory together, best of ten."""
    data = torch.ones(128 << 20, dtype=torch.int32).view(torch.float32)
    best_s = min(_seconds(lambda: data.sum()) for _ in range(10))
    return data.numel() * 4 / best_s


def _seconds(action: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    action()
    return time.perf_counter() - start_s


def decode_figures(
    engine: Engine,
    peer: Peer,
    others: dict[str, PeerProcess],
    size: int,
    prompts: Callable[[int, int], list[list[int]]],
    *,
    quick: bool,
) -> list[Figure]:
    """Tokens per second at one batch size against every peer, in turn; the first round warms up."""
    steps = 12 if quick else 48
    taken: dict[str, list[float]] = {}
    bandwidths: list[float] = []
    for turn in range(2 if quick else 4):
        batch = prompts(size, DECODE_CONTEXT)
        round_s = {
            "": run_engine(engine, batch, steps)[1],
            "transformers": peer.run(batch, steps)[1],
            **{name: other.run(batch, steps) for name, other in others.items() if size <= other.max_batch},
        }
        if size == 1:
            bandwidths.append(read_bandwidth())
        if turn:
            for name, steps_s in round_s.items():
                taken.setdefault(name, []).append(statistics.median(steps_s))
    rates = {name: size / statistics.median(rounds_s) for name, rounds_s in taken.items()}
    value = rates.pop("")
    figures = [
        Figure(
            key=f"decode_batch_{size}" + ("" if name == "transformers" else f", {name}"),
            value=value,
            unit="tok/s",
            reference=rate,
            reference_name=name,
            target=DECODE_TARGET if name == "transformers" else None,
        )
        for name, rate in rates.items()
    ]
    if size == 1:
        weight_bytes = 2 * sum(parameter.numel() for parameter in peer.model.parameters())
        figures.append(
            Figure(
                key="decode_batch_1_of_bound",
                value=value,
                unit="tok/s",
                reference=statistics.median(bandwidths) / weight_bytes,
                reference_name="weights / bandwidth",
                target=BOUND_TARGET,
            )
        )
    return figures


def recorded_figures(label: str, model: str, threads: int, *, quick: bool) -> list[Figure]:
    """Decode steps recorded and call by call, in turn, at each batch size."""
    rng = random.Random(1)
    recorded, called = (build_engine(bench_config(model, threads, step_programs=on)) for on in (True, False))
    vocab_size = recorded.model_config.vocab_size
    figures = []
    for size in BATCHES:
        taken: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(4 if quick else 7):
            prompts = [[rng.randrange(vocab_size) for _ in range(DECODE_CONTEXT)] for _ in range(size)]
            for on, engine in ((True, recorded), (False, called)):
                steps_s = run_engine(engine, prompts, 16 if quick else 48)[1]
                if turn:  # the first warms up and records
                    taken[on].append(statistics.median(steps_s))
        figures.append(
            Figure(
                key=f"decode_batch_{size}, recorded, {label}",
                value=size / statistics.median(taken[True]),
                unit="tok/s",
                reference=size / statistics.median(taken[False]),
                reference_name="call by call",
                target=RECORDED_TARGET,
            )
        )
    return figures


def save_mixture(folder: str) -> None:
    """A random mixture of 8 experts of SmolLM2's width, 6 layers."""
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=576,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def bench_config(model: str, threads: int, *, step_programs: bool = True) -> WorkerConfig:
    return WorkerConfig(
        role="colocated",
        name="bench",
        orchestrator="",
        model=model,
        dtype="bfloat16",
        threads=threads,
        kv_cache_bytes=512 << 20,
        step_programs=step_programs,
    )


def main() -> int:
    parser = option_parser("engine", __doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vllm", type=Path, metavar="DIR", help="virtual environment with vLLM, to compare with")
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="virtual environment with llama-cpp-python")
    parser.add_argument("--llama-cpp-gguf", type=Path, metavar="FILE", help="the model in bfloat16 for --llama-cpp")
    parsed = parser.parse_args()
    if parsed.llama_cpp and not parsed.llama_cpp_gguf:
        parser.error("--llama-cpp needs --llama-cpp-gguf FILE")
    options = parse_options("engine", __doc__, parser)
    torch.set_num_threads(parsed.threads)
    engine = build_engine(bench_config(parsed.model, parsed.threads))
    peer = Peer(str(resolve_model(parsed.model).path), torch.bfloat16)
    rng = random.Random(0)
    vocab_size = engine.model_config.vocab_size
    rounds = 1 if options.quick else 5
    figures: list[Figure] = []

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]

    for length in PROMPT_LENGTHS:
        ours, theirs = [], []
        for turn in range(rounds + 1):
            batch = prompts(1, length)
            pair = run_engine(engine, batch, 1)[0], peer.run(batch, 1)[0]
            if turn:  # the first warms up
                ours.append(pair[0])
                theirs.append(pair[1])
        figures.append(
            Figure(
                key=f"prefill_{length}",
                value=length / statistics.median(ours),
                unit="tok/s",
                reference=length / statistics.median(theirs),
                reference_name="transformers",
                target=PREFILL_TARGET,
            )
        )
    others: dict[str, PeerProcess] = {}
    try:
        for name, option, script, folder, model, max_batch in (
            ("vLLM", "--vllm", "run_vllm.py", parsed.vllm, resolve_model(parsed.model).path, max(BATCHES)),
            ("llama.cpp", "--llama-cpp", "run_llama_cpp.py", parsed.llama_cpp, parsed.llama_cpp_gguf, 1),
        ):
            if folder is not None:
                others[name] = PeerProcess(
                    option,
                    script,
                    folder,
                    model=str(model),
                    threads=parsed.threads,
                    max_batch=max_batch,
                    num_tokens=max_batch * (DECODE_CONTEXT + 64),
                )
        for size in BATCHES:
            figures += decode_figures(engine, peer, others, size, prompts, quick=options.quick)
    except PeerError as error:
        parser.error(str(error))
    finally:
        for other in others.values():
            other.close()
    del engine, peer
    figures += recorded_figures(parsed.model, parsed.model, parsed.threads, quick=options.quick)
    with tempfile.TemporaryDirectory() as folder:
        save_mixture(folder)
        figures += recorded_figures("mixture of experts", folder, parsed.threads, quick=options.quick)
    return report("engine", figures, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
