"""One attempt at a request, as workers see it."""

from __future__ import annotations

from typing import Literal

import msgspec

from anabranch.bounds import Count, ExtentList, Name, Salt
from anabranch.request.sampling_params import SamplingParams

EndReason = Literal["stop", "length", "cancelled", "failed", "preempted"]


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One attempt at a request.

    Attributes:
        request_id: drawn by the orchestrator for each request that it accepts; never a client's own word, which may
            come twice.
        epoch: attempt number; what an older epoch sends is dropped.
        prompt_ids: the client's prompt.
        output_ids: what earlier epochs already delivered; this epoch goes on at index `len(output_ids)`.
        sampling: `max_tokens` is set here, and counts `output_ids`; `seed` is set unless greedy.
        cache_salt: KV blocks are shared with requests of the same salt alone; empty is one of them.
    """

    request_id: Name
    epoch: Count
    prompt_ids: ExtentList
    sampling: SamplingParams
    output_ids: ExtentList = ()
    cache_salt: Salt = ""

    @property
    def key(self) -> tuple[str, int]:
        return (self.request_id, self.epoch)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All known tokens: what prefill has to compute."""
        return self.prompt_ids + self.output_ids
