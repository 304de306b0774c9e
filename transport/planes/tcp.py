"""The TCP plane: sockets that are joined with a handshake, one progress thread for all of them."""

from __future__ import annotations

import socket

from anabranch.errors import PeerLost, TransportError
from anabranch.system.clock import awake_s
from transport.planes.base import Link, PlaneHandler
from transport.planes.handshake import Acceptor, Introduction, dial, my_name
from transport.planes.loop import ProgressLoop
from transport.planes.tcp_link import TcpLink

KIND = 1
SCHEME = "tcp"

SOCKET_BUFFER_BYTES = 4 << 20


class TcpPlane:
    """The plane over sockets.

    Args:
        listen_host: interface to listen on; the port is chosen by the system.
    """

    name = SCHEME

    def __init__(self, handler: PlaneHandler, *, listen_host: str = "127.0.0.1") -> None:
        self.handler = handler
        self._links: set[TcpLink] = set()
        self._admitted: dict[socket.socket, str] = {}
        self._closed = False
        self.loop = ProgressLoop("plane-tcp", self._tick)
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
        sock, welcome = dial(SCHEME, KIND, address, Introduction(name=my_name()), timeout_s)
        link = self._link(sock, welcome.name)

        def join() -> None:
            if self._closed:
                link.drop(PeerLost("this plane is closed"))
            else:
                self._links.add(link)
                link.start()

        if self._closed:
            sock.close()
            raise PeerLost("this plane is closed")
        self.loop.call_soon(join)
        return link

    def dropped(self, link: TcpLink) -> None:
        """See `LinkOwner`."""
        self._links.discard(link)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.loop.stop(self._shut)

    def _shut(self) -> None:
        self._acceptor.close()
        for link in list(self._links):
            link.drop(PeerLost("this plane is closed"))

    def _link(self, sock: socket.socket, peer: str) -> TcpLink:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        return TcpLink(self, sock, peer)

    def _admit(self, sock: socket.socket, hello: Introduction) -> Introduction:
        self._admitted[sock] = hello.name
        return Introduction(name=my_name())

    def _joined(self, sock: socket.socket) -> None:
        link = self._link(sock, self._admitted.pop(sock))
        self._links.add(link)
        link.start()

    def _left(self, sock: socket.socket) -> None:
        del self._admitted[sock]

    def _tick(self) -> float:
        now = awake_s()
        left = self._acceptor.expire(now)
        for link in list(self._links):
            left = min(left, link.expire(now))
        return max(0.001, left)
