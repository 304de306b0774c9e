"""One attempt at a request inside an engine: its tokens, its blocks, and how far it has been computed.

`num_computed` counts tokens whose KV is in the cache. What remains is computed in chunks; a decode step is
a chunk of one. Once nothing remains, the last token's logits are sampled and the sampled token is appended.
"""

from __future__ import annotations

import time

from anabranch.cache.block_table import BlockTable
from anabranch.request.ffn_times import FfnTimes
from anabranch.request.request import Request
from anabranch.step.plan import SampleSpec, SequencePlan


class Sequence:
    """A request's attempt while an engine holds it.

    Args:
        request: what to compute.
        arrival_s: `time.monotonic()` when the engine received it; orders requests.
    """

    def __init__(self, request: Request, arrival_s: float | None = None) -> None:
        self.request = request
        self.arrival_s = time.monotonic() if arrival_s is None else arrival_s
        self.started_s: float | None = None
        self.first_token_s: float | None = None
        self.tokens: list[int] = list(request.token_ids)
        self.table: BlockTable | None = None
        self.num_computed = 0
        self.num_cached_tokens = 0
        # What its steps cost at FFN workers.
        self.ffn: FfnTimes | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.request.key

    @property
    def age(self) -> tuple[float, str]:
        """Sorts oldest first, without ties."""
        return (self.arrival_s, self.request.request_id)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        """Tokens generated so far, earlier epochs included: the next token's index."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens still to compute before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    @property
    def queue_s(self) -> float:
        return 0.0 if self.started_s is None else self.started_s - self.arrival_s

    @property
    def prefill_s(self) -> float:
        if self.started_s is None or self.first_token_s is None:
            return 0.0
        return self.first_token_s - self.started_s

    def hold(self, table: BlockTable) -> None:
        """Take the blocks that were admitted for this sequence; cached ones count as computed."""
        self.table = table
        self.num_computed = table.num_cached_tokens
        self.num_cached_tokens = table.num_cached_tokens

    def let_go(self) -> BlockTable | None:
        """Give the blocks up; everything is to be computed again."""
        table, self.table = self.table, None
        self.num_computed = 0
        return table

    def offload(self) -> BlockTable:
        """Give the blocks up while their KV is kept elsewhere: what is computed stays so."""
        assert self.table is not None
        table, self.table = self.table, None
        return table

    def resume(self, table: BlockTable) -> None:
        """Take blocks again, into which the KV that was kept comes back; those that are cached have it already."""
        self.table = table
        self.num_computed = max(self.num_computed, table.num_cached_tokens)

    def plan(self, num_new: int) -> SequencePlan:
        """The next `num_new` tokens as a part of a step; samples if they are the last ones."""
        assert self.table is not None and 0 < num_new <= self.num_remaining
        start = self.num_computed
        sample = self._spec(self.num_output) if start + num_new == len(self.tokens) else None
        if self.started_s is None:
            self.started_s = time.monotonic()
        return SequencePlan(
            request_id=self.request.request_id,
            epoch=self.request.epoch,
            token_ids=tuple(self.tokens[start : start + num_new]),
            start=start,
            block_ids=self.table.block_ids,
            sample=sample,
        )

    def follow(self, place: int) -> SequencePlan:
        """The token that the step in flight samples as a part of the next step; it samples the one after.

        Args:
            place: see `SequencePlan.follows`.
        """
        assert self.table is not None and self.num_remaining == 1
        return SequencePlan(
            request_id=self.request.request_id,
            epoch=self.request.epoch,
            token_ids=(0,),
            start=len(self.tokens),
            block_ids=self.table.block_ids,
            sample=self._spec(self.num_output + 1),
            follows=place,
        )

    def _spec(self, index: int) -> SampleSpec:
        """How the token of that number is chosen; its history is what is known here."""
        params = self.request.sampling
        history = params.needs_history
        return SampleSpec(
            params=params,
            index=index,
            prompt_ids=self.request.prompt_ids if history else (),
            output_ids=tuple(self.tokens[len(self.request.prompt_ids) :]) if history else (),
        )

    def append(self, token_id: int) -> None:
        """Add a sampled token; its KV is computed by a later step."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic()
        self.tokens.append(token_id)
