"""Tensor planes: large payloads between processes, one interface over several transports.

    plane = create_plane("tcp", handler, listen_host="127.0.0.1")   # listens, owns one progress thread
    plane.address                                                   # give this to peers, by control channel
    link = plane.connect(peer_address, timeout_s=5.0)               # PeerLost, DeadlineExceeded, MalformedMessage
    link.send(header, payload_memoryview)                           # -> concurrent.futures.Future[None]
    plane.close()

`handler` is a `PlaneHandler` (see `base.py`); its methods run on the plane's progress thread. A link works
both ways: what the acceptor sends back arrives at the connector's handler.

Which plane:

    usable_planes()                       -> ("inproc", "ucx", "tcp"), best first; what WorkerInfo.planes says
    available_planes()                    -> a PlaneStatus for every plane, with the remedy where it is missing
    reachable_planes(addresses)           -> names of a peer's addresses that this process may connect to
                                             (drops inproc addresses of other processes)
    choose_plane("auto", ours, theirs)    -> the best that both have; a name that is missing raises
                                             TransportUnavailable with the remedy

Addresses are opaque text: `inproc:...`, `tcp:HOST:PORT:TOKEN`, `ucx:HOST:PORT:TOKEN`. The token is random for
each plane, so a stranger who finds the port is refused with its first bytes.

A link is pinned to the thread that progresses it, never to the thread that sends: `send` may be called from
anywhere, also from inside a handler.
"""

from transport.planes.base import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, Link, Plane, PlaneHandler
from transport.planes.registry import (
    PlaneStatus,
    available_planes,
    choose_plane,
    configured_planes,
    create_plane,
    reachable_planes,
    usable_planes,
)

__all__ = [
    "MAX_HEADER_BYTES",
    "MAX_PAYLOAD_BYTES",
    "Link",
    "Plane",
    "PlaneHandler",
    "PlaneStatus",
    "available_planes",
    "choose_plane",
    "configured_planes",
    "create_plane",
    "reachable_planes",
    "usable_planes",
]
