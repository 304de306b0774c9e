"""A request as workers see it, and what comes back."""

from __future__ import annotations

from typing import Literal

import msgspec

from anabranch.errors import AnabranchError, error_from_code
from anabranch.sampling.params import SamplingParams

EndReason = Literal["stop", "length", "cancelled", "failed", "preempted"]


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One attempt at a request.

    Attributes:
        request_id: unique in the cluster.
        epoch: attempt number; what an older epoch sends is dropped.
        prompt_ids: the client's prompt.
        output_ids: what earlier epochs already delivered; this epoch goes on at index `len(output_ids)`.
        sampling: `max_tokens` is set here, and counts `output_ids`; `seed` is set unless greedy.
    """

    request_id: str
    epoch: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    output_ids: tuple[int, ...] = ()

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
    top: tuple[tuple[int, float], ...] = ()


class Token(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One generated token; `(request_id, epoch, index)` is its identity."""

    request_id: str
    epoch: int
    index: int
    token_id: int
    logprob: TokenLogprob | None = None


class WireError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An AnabranchError on the wire."""

    code: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> WireError:
        code = error.code if isinstance(error, AnabranchError) else AnabranchError.code
        text = str(error) or type(error).__name__
        return cls(code=code, message=text[:2000])

    def to_error(self) -> AnabranchError:
        return error_from_code(self.code, self.message)
