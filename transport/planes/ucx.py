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
from anabranch.system.clock import awake_s
from transport.planes.base import Link, PlaneHandler
from transport.planes.handshake import Acceptor, Introduction, dial, my_name
from transport.planes.loop import MIN_SELECT_S, ProgressLoop
from transport.planes.ucx_api import UcxWorker, make_context, make_worker, transports_for
from transport.planes.ucx_link import UcxLink

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


class UcxPlane:
    """The plane over UCX.

    Args:
        listen_host: interface of the joining socket; beyond loopback UCX's own transports listen as well.
        transports: UCX's names (UCX_TLS); None: shared memory on loopback, else all.
    """

    name = SCHEME

    def __init__(self, handler: PlaneHandler, *, listen_host: str = "127.0.0.1", transports: str | None = None) -> None:
        self.handler = handler
        self._links: set[UcxLink] = set()
        self._hot: list[UcxLink] = []
        self._admitted: dict[socket.socket, UcxLink] = {}
        self._closed = False
        self._context = make_context(transports or transports_for(listen_host))
        self.loop = ProgressLoop("plane-ucx", self._tick)
        try:
            self._acceptor = Acceptor(self.loop, SCHEME, KIND, listen_host, self._admit, self._joined, self._left)
        except TransportError:
            self.loop.stop(lambda: None)
            raise
        self.loop.start()

    @property
    def address(self) -> str:
        return self._acceptor.address

    @property
    def num_refused(self) -> int:
        """Connections that did not show the token."""
        return self._acceptor.num_refused

    def connect(self, address: str, timeout_s: float) -> Link:
        worker = self._make_worker()
        introduction = Introduction(name=my_name(), endpoint=worker.address.tobytes())
        side, welcome = dial(SCHEME, KIND, address, introduction, timeout_s)
        try:
            link = UcxLink(self, worker, welcome.endpoint, side, welcome.name)
        except TransportError:
            side.close()
            raise

        def join() -> None:
            self._links.add(link)
            if self._closed:
                link.drop(PeerLost("this plane is closed"))
            else:
                link.start()

        self.loop.call_soon(join)
        return link

    def heated(self, link: UcxLink) -> None:
        """See `UcxLinkOwner`."""
        self._hot.append(link)

    def dropped(self, link: UcxLink) -> None:
        """See `LinkOwner`."""
        if link.hot:
            self._hot.remove(link)
        self._links.discard(link)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.loop.stop(self._shut)
        del self._context

    def _shut(self) -> None:
        self._acceptor.close()
        for link in [*self._links, *self._admitted.values()]:
            link.drop(PeerLost("this plane is closed"))

    def _make_worker(self) -> UcxWorker:
        if self._closed:
            raise PeerLost("this plane is closed")
        return make_worker(self._context)

    def _admit(self, side: socket.socket, hello: Introduction) -> Introduction:
        worker = self._make_worker()
        link = UcxLink(self, worker, hello.endpoint, side, hello.name)
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
        awake = awake_s()
        left = self._acceptor.expire(awake)
        for link in list(self._links):
            left = min(left, link.expire(awake))
        if hot:
            return DOZE_S if all(now - link.quiet_since > SPIN_S for link in hot) else 0.0
        return max(MIN_SELECT_S, left)
