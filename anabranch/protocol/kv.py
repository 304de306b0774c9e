"""Where a request's KV cache shall go."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from anabranch.bounds import Count, ExtentList, Int63, Name, Place, Seconds
from anabranch.parallel.layout import KvLayout

MAX_PLANES = 16
MAX_RANKS = 4096


class KvDestination(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a decode worker answers to a reservation; the prefill worker streams to it.

    Attributes:
        worker: the decode worker's name.
        stream_id: names the stream at the decode worker.
        generation: of the lease; a slice with another generation is refused.
        layout: how the decode worker spreads KV over its ranks.
        addresses: for each rank, plane name -> address to connect to.
        block_ids: blocks that the lease holds, in token order (for the record; ranks place slices themselves).
        num_cached_tokens: leading tokens that the decode worker already holds; they are not sent.
        num_tokens: tokens whose KV must arrive before the commit, cached ones included.
        lease_s: seconds until the lease expires unless slices keep arriving.
    """

    worker: Name
    stream_id: Int63
    generation: Int63
    layout: KvLayout
    addresses: Annotated[
        tuple[Annotated[dict[Name, Place], Meta(max_length=MAX_PLANES)], ...], Meta(max_length=MAX_RANKS)
    ]
    block_ids: ExtentList
    num_cached_tokens: Count
    num_tokens: Count
    lease_s: Seconds


class KvStreamStats(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one finished KV stream cost, on the sender's clock.

    Attributes:
        payload_bytes: K and V bytes sent.
        transport: plane name.
        stream_s: first slice posted to commit acknowledged.
        exposed_s: the part of `stream_s` after prefill's compute had ended.
    """

    payload_bytes: Count
    transport: Name
    stream_s: Seconds
    exposed_s: Seconds

    @property
    def overlap(self) -> float:
        """Share of the stream's time that prefill hid, 0 to 1."""
        if self.stream_s <= 0.0:
            return 1.0
        return max(0.0, min(1.0, 1.0 - self.exposed_s / self.stream_s))
