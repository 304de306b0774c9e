"""What a worker that generates tells its ranks, and what they report: the same on one rank and on many."""

from __future__ import annotations

import msgspec

from anabranch.protocol.ffn import FfnPlacement
from anabranch.protocol.wire_error import WireError
from anabranch.request.token import TokenLogprob
from anabranch.schedule.lane_costs import LaneCosts
from anabranch.step.plan import StepPlan


class Command(msgspec.Struct, frozen=True, kw_only=True, tag_field="c"):
    """Base: ranks obey in the order of sending."""


class OpenStream(Command, frozen=True, kw_only=True, tag="open"):
    """Expect a KV stream into these blocks; answered with StreamOpened."""

    stream_id: int
    generation: int
    block_ids: tuple[int, ...]
    num_cached_tokens: int
    num_tokens: int


class CloseStream(Command, frozen=True, kw_only=True, tag="close"):
    """Expect no more of a stream; nothing is written to its blocks any more. Not answered."""

    stream_id: int


class Step(Command, frozen=True, kw_only=True, tag="step"):
    """Compute."""

    plan: StepPlan


class Offload(Command, frozen=True, kw_only=True, tag="offload"):
    """Copy blocks of the pool to host memory: `(pool block, host block)`.

    Later commands may write to the pool blocks. Not answered.
    """

    pairs: tuple[tuple[int, int], ...]


class Restore(Command, frozen=True, kw_only=True, tag="restore"):
    """Copy blocks from host memory into the pool: `(host block, pool block)`.

    Later commands find the KV there, and may write to the host blocks. Not answered.
    """

    pairs: tuple[tuple[int, int], ...]


class UseFfnNodes(Command, frozen=True, kw_only=True, tag="ffn_nodes"):
    """Send rows to these FFN nodes from now on; to attention ranks alone. Not answered."""

    placement: FfnPlacement


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="e"):
    """Base: news of one rank's part of a stream."""

    stream_id: int


class RankListens(Event, frozen=True, kw_only=True, tag="listens"):
    """Sent once, before all else, with stream 0: where the rank's tensor planes are to be reached.

    Attributes:
        copy_bytes_per_s: of blocks between pool and host memory; 0 where the rank has no host blocks.
    """

    addresses: dict[str, str]
    copy_bytes_per_s: float = 0.0


class StreamOpened(Event, frozen=True, kw_only=True, tag="opened"):
    """Slices may come."""


class StreamAlive(Event, frozen=True, kw_only=True, tag="alive"):
    """Slices have arrived; sent at most every `lease_s / 20`."""


class StreamCommitted(Event, frozen=True, kw_only=True, tag="committed"):
    """All that the rank must hold is in its blocks; the first token came with it."""

    token_id: int
    logprob: TokenLogprob | None


class StreamFailed(Event, frozen=True, kw_only=True, tag="failed"):
    """The stream will not commit."""

    error: WireError


class LanesMeasured(Event, frozen=True, kw_only=True, tag="lanes"):
    """What a lane's steps take, now and then, with stream 0; from the first rank of a node that chooses its lanes."""

    costs: LaneCosts


GenerationCommand = OpenStream | CloseStream | Step | Offload | Restore | UseFfnNodes
GenerationEvent = RankListens | StreamOpened | StreamAlive | StreamCommitted | StreamFailed | LanesMeasured
