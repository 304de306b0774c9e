"""What a prefill worker tells its ranks, and what they report: the same on one rank and on many."""

from __future__ import annotations

import msgspec

from anabranch.protocol.kv import KvDestination, KvStreamStats
from anabranch.protocol.wire_error import WireError
from anabranch.request.token import TokenLogprob
from anabranch.step.plan import StepPlan

Key = tuple[str, int]


class Command(msgspec.Struct, frozen=True, kw_only=True, tag_field="c"):
    """Base: ranks obey in the order of sending."""


class OpenStream(Command, frozen=True, kw_only=True, tag="open"):
    """Connect to the destination's ranks; answered with StreamOpened or StreamFailed."""

    key: Key
    destination: KvDestination


class Step(Command, frozen=True, kw_only=True, tag="step"):
    """Compute; the KV of each layer is sent while the next one computes."""

    plan: StepPlan


class CommitStream(Command, frozen=True, kw_only=True, tag="commit"):
    """All of the request's KV has been sent; its first token follows. Answered as the decode worker answers."""

    key: Key
    token_id: int
    logprob: TokenLogprob | None
    queue_s: float
    prefill_s: float
    num_cached_tokens: int


class EndStream(Command, frozen=True, kw_only=True, tag="end"):
    """Forget a stream; one that goes on is aborted with `error`. Not answered."""

    key: Key
    error: WireError


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="e"):
    """Base: news of one rank's part of a stream."""

    key: Key


class StreamOpened(Event, frozen=True, kw_only=True, tag="opened"):
    """The destination's ranks are connected; steps may compute the request."""


class StreamFailed(Event, frozen=True, kw_only=True, tag="failed"):
    """Comes at most once for a stream, at any time."""

    error: WireError


class StreamAcknowledged(Event, frozen=True, kw_only=True, tag="acknowledged"):
    """The decode worker has committed."""

    stats: KvStreamStats


PrefillCommand = OpenStream | Step | CommitStream | EndStream
PrefillEvent = StreamOpened | StreamFailed | StreamAcknowledged
