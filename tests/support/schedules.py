"""Sequences, schedulers and results of steps for tests of scheduling, which compute nothing."""

from __future__ import annotations

from anabranch.cache.kv_manager import KvCacheManager
from anabranch.request.request import Request
from anabranch.request.sampling_params import SamplingParams
from anabranch.sampling.stop import StopChecker
from anabranch.schedule.generation import GenerationScheduler
from anabranch.schedule.sequence import Sequence
from anabranch.step.plan import SampledToken, StepPlan, StepResult

# Ends a sequence's answer.
EOS = 99
BLOCK = 4


def sequence(
    name: str,
    length: int = 5,
    arrival_s: float = 0.0,
    *,
    first: int = 0,
    output: tuple[int, ...] = (),
    epoch: int = 0,
    max_tokens: int = 20,
    **sampling: float,
) -> Sequence:
    """A request of `length` prompt tokens that count up from `first`."""
    request = Request(
        request_id=name,
        epoch=epoch,
        prompt_ids=tuple(range(first, first + length)),
        output_ids=output,
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=(EOS,), **sampling),  # type: ignore[arg-type]
    )
    return Sequence(request, arrival_s)


def scheduler(
    num_blocks: int = 16,
    *,
    computes_prompts: bool,
    prefix_cache: bool = False,
    max_step_tokens: int = 16,
    lanes: int = 1,
) -> GenerationScheduler:
    """One with 8 places and blocks of BLOCK tokens."""
    return GenerationScheduler(
        KvCacheManager(num_blocks=num_blocks, block_size=BLOCK, prefix_cache=prefix_cache),
        StopChecker(max_context=64),
        computes_prompts=computes_prompts,
        max_running=8,
        max_step_tokens=max_step_tokens,
        lanes=lanes,
    )


def join(scheduler: GenerationScheduler, item: Sequence, token_id: int = 7) -> None:
    """Import a sequence as the KV stream does: blocks for the prompt and one token, then its first token."""
    item.hold(scheduler.cache.admit(item.key, item.tokens, item.num_tokens + 1))
    scheduler.join(item, SampledToken(request_id=item.request.request_id, epoch=0, index=0, token_id=token_id))


def answer(plan: StepPlan, token_id: int = 7, **by_name: int) -> StepResult:
    """What a runner says: one token for each sequence that samples, `token_id` or what its name is given."""
    return StepResult(
        step=plan.step,
        tokens=tuple(
            SampledToken(
                request_id=s.request_id,
                epoch=s.epoch,
                index=s.sample.index,
                token_id=by_name.get(s.request_id, token_id),
            )
            for s in plan.sequences
            if s.sample is not None
        ),
    )
