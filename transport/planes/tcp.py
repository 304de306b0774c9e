"""The TCP plane: sockets that are joined with a handshake, one progress thread for all of them."""

from __future__ import annotations

import socket

from anabranch.errors import PeerLost
from transport.planes.base import Link, PlaneHandler
from transport.planes.handshake import Introduction, dial, my_name
from transport.planes.socket_plane import SocketPlane
from transport.planes.tcp_link import TcpLink

KIND = 1
SCHEME = "tcp"

SOCKET_BUFFER_BYTES = 4 << 20


class TcpPlane(SocketPlane[TcpLink]):
    """The plane over sockets.

    Args:
        listen_host: interface to listen on.
    """

    name = SCHEME

    def __init__(self, handler: PlaneHandler, *, listen_host: str = "127.0.0.1") -> None:
        self._admitted: dict[socket.socket, str] = {}
        super().__init__(handler, SCHEME, KIND, listen_host)

    def connect(self, address: str, timeout_s: float) -> Link:
        sock, welcome = dial(SCHEME, KIND, address, Introduction(name=my_name()), timeout_s)
        if self._closed:
            sock.close()
            raise PeerLost("this plane is closed")
        link = self._link(sock, welcome.name)
        self._join(link)
        return link

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
        return max(0.001, self._expire())
