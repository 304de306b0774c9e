"""What the planes have in common whose links begin with a socket and a handshake."""

from __future__ import annotations

import socket
from typing import Generic, Protocol, TypeVar

from anabranch.errors import PeerLost, TransportError
from anabranch.system.clock import awake_s
from transport.planes.base import PlaneHandler
from transport.planes.handshake import Acceptor, Introduction
from transport.planes.loop import ProgressLoop


class SocketLink(Protocol):
    """A link, as its plane sees it, on the progress thread."""

    def start(self) -> None: ...

    def drop(self, error: Exception) -> None:
        """End the link; the handler is told once."""
        ...

    def expire(self, now: float) -> float:
        """Drop the link if something is late by `awake_s`; returns the seconds until it is."""
        ...


LinkT = TypeVar("LinkT", bound=SocketLink)


class SocketPlane(Generic[LinkT]):
    """Listens from the start, keeps its links, and ends them with itself.

    Args:
        scheme, kind: the plane's, in addresses and in the handshake.
        listen_host: interface to listen on; the port is chosen by the system.
    """

    def __init__(self, handler: PlaneHandler, scheme: str, kind: int, listen_host: str) -> None:
        self.handler = handler
        self._links: set[LinkT] = set()
        self._closed = False
        self.loop = ProgressLoop(f"plane-{scheme}", self._tick)
        try:
            self._acceptor = Acceptor(self.loop, scheme, kind, listen_host, self._admit, self._joined, self._left)
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

    def dropped(self, link: LinkT) -> None:
        """`link` has ended; called by it, on the progress thread."""
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

    def _join(self, link: LinkT) -> None:
        """Take in a link that `connect` made; from any thread."""

        def join() -> None:
            self._links.add(link)
            if self._closed:
                link.drop(PeerLost("this plane is closed"))
            else:
                link.start()

        self.loop.call_soon(join)

    def _expire(self) -> float:
        """Drop what is late; returns the seconds until something is."""
        now = awake_s()
        return min([self._acceptor.expire(now), *[link.expire(now) for link in list(self._links)]])

    # What each plane does in its own way, on the progress thread -------------------------------------------

    def _admit(self, sock: socket.socket, hello: Introduction) -> Introduction:
        """Answer the hello of a connection that showed the token."""
        raise NotImplementedError

    def _joined(self, sock: socket.socket) -> None:
        """An admitted connection has its welcome: it is a link from now on."""
        raise NotImplementedError

    def _left(self, sock: socket.socket) -> None:
        """An admitted connection ended before its welcome."""
        raise NotImplementedError

    def _tick(self) -> float:
        """Do what is due; returns the seconds until more is."""
        raise NotImplementedError
