"""Receives KV streams for one rank: checks every slice, places it, commits when all of it is there."""

from __future__ import annotations

from anabranch.parallel.layout import KvLayout
from transport.kv_stream.sink import KvSink
from transport.planes.base import Link


class KvStreamReceiver:
    """The handler of a decode rank's planes. `open` and `close` may be called from any thread.

    Args:
        max_staging_bytes: most bytes of slices that have arrived or are arriving and are not placed yet.
    """

    def __init__(self, *, max_staging_bytes: int = 256 << 20) -> None: ...

    def open(
        self,
        stream_id: int,
        generation: int,
        *,
        layout: KvLayout,
        rank: int,
        num_cached_tokens: int,
        num_tokens: int,
        sink: KvSink,
    ) -> None:
        """Expect a stream: tokens `num_cached_tokens` to `num_tokens - 1` of the heads that `rank` holds."""

    def close(self, stream_id: int) -> None:
        """Forget a stream; later slices of it are refused. Idempotent. When this returns, `place` is over."""

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None: ...

    def on_payload(self, link: Link, header: bytes, buffer: memoryview) -> None: ...

    def on_lost(self, link: Link, error: Exception) -> None: ...
