"""The engine without workers around it, against transformers on the same device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from anabranch.cache.kv_manager import KvCacheManager
from anabranch.config.options import DtypeName
from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import build_engine
from anabranch.engine.device import TORCH_DTYPES
from anabranch.request.request import Request
from anabranch.request.sampling_params import SamplingParams
from anabranch.sampling.stop import StopChecker
from anabranch.schedule.generation import GenerationScheduler
from anabranch.schedule.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Greedy tokens, and how far each one's logit was above the second best."""

    token_ids: list[int]
    margins: list[float]


def engine_answers(
    folder: Path,
    prompts: list[list[int]],
    max_tokens: int,
    *,
    device: str,
    dtype: DtypeName,
    max_step_tokens: int = 64,
    kv_cache_bytes: int = 64 << 20,
) -> tuple[str, list[list[int]]]:
    """The kernels' name, and greedy tokens of all prompts computed together, in chunks beside decode steps."""
    engine = build_engine(
        WorkerConfig(
            role="colocated",
            name="check",
            orchestrator="",
            model=str(folder),
            dtype=dtype,
            device=device,
            kv_cache_bytes=kv_cache_bytes,
        )
    )
    scheduler = GenerationScheduler(
        KvCacheManager(num_blocks=engine.kv.num_blocks, block_size=engine.kv.block_size, prefix_cache=False),
        StopChecker(max_context=engine.max_context),
        computes_prompts=True,
        max_running=len(prompts),
        max_step_tokens=max_step_tokens,
    )
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=max_tokens)
        request = Request(request_id=str(index), epoch=0, prompt_ids=tuple(prompt), sampling=sampling)
        scheduler.add_prompt(Sequence(request))
    answers: list[list[int]] = [[] for _ in prompts]
    while (plan := scheduler.schedule()[0]) is not None:
        result = engine.runner.execute(plan)
        for token in result.tokens:
            answers[int(token.request_id)].append(token.token_id)
        scheduler.update(plan, result)
    return engine.runner.kernels.name, answers


@torch.inference_mode()
def transformers_answers(
    folder: Path, prompts: list[list[int]], max_tokens: int, *, device: str, dtype: DtypeName
) -> list[Answer]:
    """One prompt at a time, end-of-sequence ignored."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=TORCH_DTYPES[dtype], trust_remote_code=False
    )
    model.set_experts_implementation("eager")
    model = model.eval().to(device)
    answers = []
    for prompt in prompts:
        token_ids: list[int] = []
        margins: list[float] = []
        cache = None
        inputs = torch.tensor([prompt], device=device)
        while len(token_ids) < max_tokens:
            step = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = step.past_key_values
            best = step.logits[0, -1].float().topk(2)
            token_ids.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            inputs = best.indices[:1].unsqueeze(0)
        answers.append(Answer(token_ids=token_ids, margins=margins))
    return answers


def assert_same_tokens(got: list[list[int]], want: list[Answer], *, max_tie: float = 0.0) -> None:
    """Token for token; after a choice that rounding decides, `max_tie` or closer, an answer may go its own way."""
    for index, (tokens, answer) in enumerate(zip(got, want, strict=True)):
        assert len(tokens) == len(answer.token_ids), index
        for position, (token, expected) in enumerate(zip(tokens, answer.token_ids, strict=True)):
            if token != expected:
                margin = answer.margins[position]
                assert margin <= max_tie, f"prompt {index}, token {position}: {token}, not {expected} by {margin}"
                break
