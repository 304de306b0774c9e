"""The sending side of a rank: its planes, its links to destination ranks, and the way back for Acks."""

from __future__ import annotations

from anabranch.parallel.layout import KvLayout
from anabranch.protocol.kv import KvDestination
from transport.kv_stream.sender import KvStreamSender
from transport.planes.base import Link


class KvStreamSource:
    """Opens KV streams; links are kept and shared by streams to the same address.

    Args:
        planes: names that may be used here (`usable_planes()`).
        configured: a plane's name, or auto.
        listen_host: interface for the planes' own sockets.
        connect_timeout_s: longest wait for a link.
        send_timeout_s: longest wait of `send_layer` for bytes in flight.
        max_in_flight_bytes: of each stream.
    """

    def __init__(
        self,
        *,
        planes: tuple[str, ...],
        configured: str = "auto",
        listen_host: str = "127.0.0.1",
        connect_timeout_s: float = 5.0,
        send_timeout_s: float = 30.0,
        max_in_flight_bytes: int = 64 << 20,
    ) -> None: ...

    def open(
        self, destination: KvDestination, *, source_layout: KvLayout, source_rank: int = 0
    ) -> KvStreamSender:
        """Start a stream. Blocks while connecting. Raises TransportUnavailable, PeerLost, DeadlineExceeded."""
        raise NotImplementedError

    def close(self) -> None:
        """Abort open streams, close links and planes. Idempotent."""

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None: ...

    def on_payload(self, link: Link, header: bytes, buffer: memoryview) -> None: ...

    def on_lost(self, link: Link, error: Exception) -> None: ...
