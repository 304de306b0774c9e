"""The UCX plane: shared memory within a host, the fastest network between hosts.

A socket with a handshake (as in the TCP plane) joins two ends first; over it they exchange their UCX addresses,
and it stays open: when it ends, the peer has ended. The progress thread polls a link while something moves and
for a moment after, then dozes, then sleeps on UCX's event descriptor.
"""

from __future__ import annotations

import ctypes
import socket
import time

from anabranch.errors import PeerLost, TransportError
from transport.planes.base import Link, PlaneHandler
from transport.planes.handshake import Introduction, dial, my_name
from transport.planes.loop import MIN_SELECT_S
from transport.planes.socket_plane import SocketPlane
from transport.planes.ucx_link import UcxLink
from transport.ucx.api import UcxWorker, make_context, make_worker, transports_for

KIND = 2
SCHEME = "ucx"

# After the last thing that happened on a link it is polled for a moment, because what happens next is near; then
# looked at now and then, because a peer pays a system call for each event that it has to wake a sleeper for (a
# fifth of the bandwidth at 1 MiB); then left until UCX's event descriptor calls.
SPIN_S = 50e-6
DOZE_S = 100e-6
LINGER_S = 1e-3
POLLS_PER_TURN = 16

# Unlike os.sched_yield, this lets go of the interpreter lock first.
_sched_yield = ctypes.CDLL(None).sched_yield


class UcxPlane(SocketPlane[UcxLink]):
    """The plane over UCX.

    Args:
        listen_host: interface of the joining socket; beyond loopback UCX's own transports listen as well.
        transports: UCX's names (UCX_TLS); None: shared memory on loopback, else all.
    """

    name = SCHEME

    def __init__(self, handler: PlaneHandler, *, listen_host: str = "127.0.0.1", transports: str | None = None) -> None:
        self._hot: list[UcxLink] = []
        self._admitted: dict[socket.socket, UcxLink] = {}
        self._context = make_context(transports or transports_for(listen_host))
        super().__init__(handler, SCHEME, KIND, listen_host)

    def connect(self, address: str, timeout_s: float) -> Link:
        worker = self._make_worker()
        introduction = Introduction(name=my_name(), endpoint=worker.address.tobytes())
        side, welcome = dial(SCHEME, KIND, address, introduction, timeout_s)
        if self._closed:
            side.close()
            raise PeerLost("this plane is closed")
        try:
            link = UcxLink(self, self._hot.append, worker, welcome.endpoint, side, welcome.name)
        except TransportError:
            side.close()
            raise
        self._join(link)
        return link

    def dropped(self, link: UcxLink) -> None:
        if link.hot:
            self._hot.remove(link)
        super().dropped(link)

    def close(self) -> None:
        if not self._closed:
            super().close()
            del self._context

    def _shut(self) -> None:
        super()._shut()
        for link in list(self._admitted.values()):
            link.drop(PeerLost("this plane is closed"))

    def _make_worker(self) -> UcxWorker:
        if self._closed:
            raise PeerLost("this plane is closed")
        return make_worker(self._context)

    def _admit(self, side: socket.socket, hello: Introduction) -> Introduction:
        worker = self._make_worker()
        link = UcxLink(self, self._hot.append, worker, hello.endpoint, side, hello.name)
        self._admitted[side] = link
        return Introduction(name=my_name(), endpoint=worker.address.tobytes())

    def _joined(self, side: socket.socket) -> None:
        link = self._admitted.pop(side)
        self._links.add(link)
        link.start()

    def _left(self, side: socket.socket) -> None:
        self._admitted.pop(side).drop(PeerLost("the peer was gone before it could be welcomed"))

    def _tick(self) -> float:
        hot = self._hot
        now = time.monotonic()
        for _ in range(POLLS_PER_TURN):
            if not hot:
                break
            quiet = True
            for link in list(hot):
                if link.poll():
                    link.quiet_since = time.monotonic()
                    quiet = False
            if quiet:
                # Whoever computes on this core goes first.
                _sched_yield()
            now = time.monotonic()
            if all(now - link.quiet_since > SPIN_S for link in hot):
                break
        for link in list(hot):
            if link.hot and now - link.quiet_since > LINGER_S and link.rest():
                hot.remove(link)
        left = self._expire()
        if hot:
            return DOZE_S if all(now - link.quiet_since > SPIN_S for link in hot) else 0.0
        return max(MIN_SELECT_S, left)
