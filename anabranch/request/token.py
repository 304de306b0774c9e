"""What a request gets back: tokens and their log-probabilities."""

from __future__ import annotations

import msgspec


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
