"""The sending side of a rank: its planes, its links to destination ranks, and the way back for Acks."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping

from anabranch.errors import MalformedMessage, PeerLost, TransportUnavailable
from anabranch.kernels.base import Kernels
from anabranch.kernels.plain import PlainKernels
from anabranch.parallel.layout import KvLayout
from anabranch.protocol.kv import KvDestination
from anabranch.system.logs import LimitedLog
from transport.kv_stream.messages import decode_to_sender
from transport.kv_stream.sender import KvStreamSender
from transport.kv_stream.staging import StagingPool
from transport.planes.base import Link, Plane
from transport.planes.registry import choose_plane, create_plane, reachable_planes

logger = logging.getLogger(__name__)

# All streams together, in units of one stream's share.
MAX_SHARES = 8


class _Connecting:
    """One address that threads wait for; the first of them connects."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_threads = 0


class KvStreamSource:
    """Opens KV streams; links are kept and shared by streams to the same address.

    Args:
        planes: names that may be used here (`configured_planes()`).
        kernels: pack slices; None: PyTorch operations.
        configured: a plane's name, or auto.
        listen_host: interface for the planes' own sockets.
        connect_timeout_s: longest wait for a link.
        send_timeout_s: longest wait of `send_layer` for bytes in flight.
        max_in_flight_bytes: of each stream. Few enough that buffers are still in the cache when they are used again.
    """

    def __init__(
        self,
        *,
        planes: tuple[str, ...],
        kernels: Kernels | None = None,
        configured: str = "auto",
        listen_host: str = "127.0.0.1",
        connect_timeout_s: float = 5.0,
        send_timeout_s: float = 30.0,
        max_in_flight_bytes: int = 16 << 20,
    ) -> None:
        self._names = planes
        self._kernels = kernels or PlainKernels()
        self._configured = configured
        self._listen_host = listen_host
        self._connect_timeout_s = connect_timeout_s
        self._send_timeout_s = send_timeout_s
        self._max_in_flight_bytes = max_in_flight_bytes
        self._log = LimitedLog(logger)
        self._pool = StagingPool(MAX_SHARES * max_in_flight_bytes)
        # Guards what follows; never held while connecting.
        self._lock = threading.Lock()
        self._closed = False
        self._planes: dict[str, Plane] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._gone: weakref.WeakSet[Link] = weakref.WeakSet()
        self._connecting: dict[tuple[str, str], _Connecting] = {}
        self._senders: dict[tuple[int, int], set[KvStreamSender]] = {}

    @property
    def staging_bytes(self) -> int:
        """Bytes of staging buffers in use."""
        return self._pool.used_bytes

    def open(self, destination: KvDestination, *, source_layout: KvLayout, source_rank: int = 0) -> KvStreamSender:
        """Start a stream. Blocks while connecting.

        Raises:
            TransportUnavailable: no plane joins the two ends; the message gives the remedy.
            PeerLost, DeadlineExceeded: a destination rank cannot be reached.
        """
        if len(destination.addresses) != destination.layout.num_ranks:
            raise TransportUnavailable(
                f"{destination.worker} gives {len(destination.addresses)} addresses for its "
                f"{destination.layout.num_ranks} ranks"
            )
        reached = [self._reach(destination.worker, addresses) for addresses in destination.addresses]
        names, links = [name for name, _ in reached], [link for _, link in reached]
        sender = KvStreamSender(
            links,
            destination,
            source_layout=source_layout,
            source_rank=source_rank,
            transport="+".join(sorted(set(names))),
            kernels=self._kernels,
            pool=self._pool,
            max_in_flight_bytes=self._max_in_flight_bytes,
            send_timeout_s=self._send_timeout_s,
            forget=self._forget,
        )
        with self._lock:
            known = set(self._links.values())
            gone = self._closed or any(link not in known for link in links)
            if not gone:
                self._senders.setdefault((destination.stream_id, destination.generation), set()).add(sender)
        if gone:  # lost since it was looked up, so nobody would tell the sender
            raise PeerLost(f"the link to {destination.worker} was lost")
        return sender

    def close(self) -> None:
        """Abort open streams, close links and planes. Idempotent."""
        with self._lock:
            self._closed = True
            senders = [sender for group in self._senders.values() for sender in group]
            planes = list(self._planes.values())
            self._planes.clear()
        for sender in senders:
            sender.abort(PeerLost("the sender closes"))
        for plane in planes:
            plane.close()

    # What a plane calls, on its progress thread ---------------------------------------------------------

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None:
        if payload_bytes:
            raise MalformedMessage(f"an acknowledgement with a payload of {payload_bytes} bytes")
        ack = decode_to_sender(header)
        with self._lock:
            senders = list(self._senders.get((ack.stream_id, ack.generation), ()))
        for sender in senders:
            if link in sender.links:
                sender.acknowledged(link, ack)
        return None

    def on_payload(self, link: Link, header: bytes, buffer: memoryview) -> None:
        raise MalformedMessage("an acknowledgement with a payload")

    def on_lost(self, link: Link, error: Exception) -> None:
        with self._lock:
            self._gone.add(link)
            for key in [key for key, known in self._links.items() if known is link]:
                del self._links[key]
            senders = [sender for group in self._senders.values() for sender in group if link in sender.links]
        for sender in senders:
            sender.lost(link, error)

    # Links ----------------------------------------------------------------------------------------------

    def _reach(self, worker: str, addresses: Mapping[str, str]) -> tuple[str, Link]:
        """A link to a rank, and its plane: the best that both ends have, or with auto the next where that fails."""
        theirs, ours = reachable_planes(addresses), self._names
        while True:
            name = choose_plane(self._configured, ours, theirs)
            try:
                return name, self._link(name, addresses[name])
            except (TransportUnavailable, PeerLost) as error:
                ours = tuple(other for other in ours if other != name)
                if self._closed or self._configured != "auto" or not set(ours) & set(theirs):
                    raise
                self._log.warning(f"{name} does not reach {worker}: {error}; another plane is tried")

    def _link(self, name: str, address: str) -> Link:
        key = (name, address)
        with self._lock:
            connecting = self._connecting.setdefault(key, _Connecting())
            connecting.num_threads += 1
        try:
            with connecting.lock:
                with self._lock:
                    if key in self._links:
                        return self._links[key]
                link = self._plane(name).connect(address, self._connect_timeout_s)
                with self._lock:
                    if link in self._gone:
                        raise PeerLost(f"the {name} link was lost at once")
                    self._links[key] = link
                return link
        finally:
            with self._lock:
                connecting.num_threads -= 1
                if not connecting.num_threads:
                    del self._connecting[key]

    def _plane(self, name: str) -> Plane:
        with self._lock:
            if self._closed:
                raise PeerLost("the sender is closed")
            if name not in self._planes:
                self._planes[name] = create_plane(name, self, listen_host=self._listen_host)
            return self._planes[name]

    def _forget(self, sender: KvStreamSender) -> None:
        key = (sender.destination.stream_id, sender.destination.generation)
        with self._lock:
            group = self._senders.get(key, set())
            group.discard(sender)
            if not group:
                self._senders.pop(key, None)
