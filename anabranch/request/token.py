"""What a request gets back: tokens and their log-probabilities."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from anabranch.bounds import Count, Extent, Name
from anabranch.request.sampling_params import MAX_LOGPROBS


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
