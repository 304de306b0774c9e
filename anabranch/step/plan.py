"""A step plan: what one forward pass computes. Emitted by a scheduler on the CPU, without torch.

A plan says everything that a rank needs, so a rank keeps no state between steps but its weights, its KV cache and
the tokens that the last step sampled, and plans can travel as MessagePack. These tokens are what a plan may be made
ahead of: every rank has them as soon as they are sampled, the scheduler only later.
"""

from __future__ import annotations

import msgspec

from anabranch.request.sampling_params import SamplingParams
from anabranch.request.token import TokenLogprob


class SampleSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How the token after a sequence's last planned token is chosen.

    Attributes:
        index: index of the token to be sampled among the request's generated tokens; with the seed it
            makes sampling repeatable on any worker.
        prompt_ids, output_ids: set only where `params.needs_history`; a sequence that `follows` lacks the token that
            it follows, which the ranks know.
    """

    params: SamplingParams
    index: int
    prompt_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()


class SequencePlan(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence's part of a step.

    Attributes:
        token_ids: new tokens to compute, at positions `start`, `start + 1`, ...
        start: tokens whose KV is already in the cache.
        block_ids: the block table, covering at least `start + len(token_ids)` tokens.
        sample: set when the last new token's logits are to be sampled.
        follows: set when the one new token is not known yet (`token_ids` holds a 0): its place among the tokens that
            the lane's step before this one samples, counted in the order of that plan's sequences that sample.
    """

    request_id: str
    epoch: int
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    sample: SampleSpec | None = None
    follows: int | None = None

    @property
    def num_new_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def context_len(self) -> int:
        """Tokens in the cache after this step."""
        return self.start + len(self.token_ids)


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One forward pass over a ragged batch.

    Attributes:
        lane: steps of one lane follow each other; those of another go their own way. `follows` counts within a lane.
    """

    step: int
    sequences: tuple[SequencePlan, ...]
    lane: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)


class SampledToken(msgspec.Struct, frozen=True, kw_only=True):
    """What a step sampled for one sequence."""

    request_id: str
    epoch: int
    index: int
    token_id: int
    logprob: TokenLogprob | None = None


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    step: int
    tokens: tuple[SampledToken, ...]
