"""A request as workers see it, and what comes back."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from anabranch.bounds import MAX_ERROR_CHARS, Count, ErrorText, Extent, ExtentList, Name, Salt
from anabranch.errors import AnabranchError, error_from_code
from anabranch.sampling.params import MAX_LOGPROBS, SamplingParams

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


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Natural-log probabilities at one position: the chosen token's and the likeliest ones'."""

    logprob: float
    top: Annotated[tuple[tuple[Extent, float], ...], Meta(max_length=MAX_LOGPROBS)] = ()


class Token(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One generated token; `(request_id, epoch, index)` is its identity."""

    request_id: Name
    epoch: Count
    index: Count
    token_id: Extent
    logprob: TokenLogprob | None = None


class WireError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An AnabranchError on the wire."""

    code: Name
    message: ErrorText

    @classmethod
    def of(cls, error: BaseException) -> WireError:
        code = error.code if isinstance(error, AnabranchError) else AnabranchError.code
        text = str(error) or type(error).__name__
        return cls(code=code, message=text[:MAX_ERROR_CHARS])

    def to_error(self) -> AnabranchError:
        return error_from_code(self.code, self.message)
