"""Steps that an engine computes before its first request, so that no request pays for what happens once."""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.engine.build import Engine
from anabranch.protocol.workers import Role
from anabranch.request.sampling_params import SamplingParams
from anabranch.step.plan import SampleSpec, SequencePlan, StepPlan

PROMPT_TOKENS = 128


# On a GPU, attention is compiled for kinds of steps, at first use: batches of these many tokens and contexts, of
# which the second and later ones make the compiler leave sizes open.
GPU_PROMPTS = ((128,), (300, 40), (900,))
GPU_DECODES = ((1, 40), (3, 90), (1, 700), (5, 900))


def warm_up_plans(engine: Engine, role: Role) -> tuple[StepPlan, ...]:
    """A prompt's chunk where the role computes prompts, a decode step where it decodes, on blocks that nobody holds.

    None for an attention worker: it computes no step without FFN workers.
    """
    if role == "attn":
        return ()
    longest = max(1, min(PROMPT_TOKENS, engine.max_context - 1))
    prompts, decodes = [[(0, longest)]], [[(longest - 1 if role == "colocated" else 0, 1)]]
    if engine.runner.device.type == "cuda":
        # All sequences of a step share the first blocks: what they hold does not matter.
        room = engine.max_context - 1  # which the pool holds
        prompts += [[(0, max(1, min(count, room))) for count in counts] for counts in GPU_PROMPTS]
        decodes += [[(max(0, min(context, room) - 1), 1)] * size for size, context in GPU_DECODES]
    shapes = {"prefill": prompts, "decode": decodes, "colocated": prompts + decodes}
    return tuple(_plan(engine.cache.block_size, spans) for spans in shapes[role])


def _plan(block_size: int, spans: Sequence[tuple[int, int]]) -> StepPlan:
    """One step of sequences that begin at a position and have so many new tokens."""
    return StepPlan(
        step=0,
        sequences=tuple(
            SequencePlan(
                request_id="warm-up",
                epoch=0,
                token_ids=(0,) * count,
                start=start,
                block_ids=tuple(range(-(-(start + count) // block_size))),
                sample=SampleSpec(params=SamplingParams(), index=0),
            )
            for start, count in spans
        ),
    )
