"""Steps that an engine computes before its first request, so that no request pays for what happens once."""

from __future__ import annotations

from anabranch.engine.build import Engine
from anabranch.engine.plan import SampleSpec, SequencePlan, StepPlan
from anabranch.protocol.workers import Role
from anabranch.sampling.params import SamplingParams

PROMPT_TOKENS = 128


def warm_up_plans(engine: Engine, role: Role) -> tuple[StepPlan, ...]:
    """A prompt's chunk where the role computes prompts, a decode step where it decodes, on blocks that nobody holds."""
    span = engine.cache.block_size
    num_tokens = max(1, min(PROMPT_TOKENS, engine.max_context - 1))
    table = tuple(range(-(-num_tokens // span)))
    shapes = {"prefill": [(0, num_tokens)], "decode": [(0, 1)], "colocated": [(0, num_tokens), (num_tokens - 1, 1)]}
    return tuple(
        StepPlan(
            step=0,
            sequences=(
                SequencePlan(
                    request_id="warm-up",
                    epoch=0,
                    token_ids=(0,) * count,
                    start=start,
                    block_ids=table,
                    sample=SampleSpec(params=SamplingParams(), index=0),
                ),
            ),
        )
        for start, count in shapes[role]
    )
