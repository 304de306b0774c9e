"""An attention rank's end of the channel: its links, and one wait for all of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from anabranch.errors import MalformedMessage, PeerLost, TransportUnavailable
from transport.m2n.base import ChannelShape, Dialled, Link
from transport.m2n.dial import dial_shm
from transport.m2n.doors import SHM, TCP
from transport.m2n.header import HEADER_BYTES, Kind, max_answer_bytes, max_call_bytes, opener
from transport.m2n.hello import TCP_KIND, draw_incarnation, introduce, read_welcome
from transport.m2n.link import PipeLink
from transport.m2n.pipe import Opener, Pipe
from transport.m2n.shm_pipe import Layout, ShmPipe, check_segment, layout_of
from transport.m2n.tcp_pipe import TcpPipe
from transport.m2n.waiter import Waiter
from transport.planes.handshake import dial

Reached = tuple[list[Callable[[], None]], Callable[[], Pipe]]
"""What to close where the connection is given up, and what makes a pipe of it."""


class PipeDialled:
    """See `Dialled`.

    Args:
        closers: called where it is given up; the first one closes its socket.
        make: the pipe; takes what the closers would close.
        link: makes a link of it.
    """

    def __init__(
        self, closers: list[Callable[[], None]], make: Callable[[], Pipe], link: Callable[[Pipe], Link]
    ) -> None:
        self._closers = closers
        self._make = make
        self._link = link

    def attach(self) -> Link:
        closers, self._closers = self._closers, []
        try:
            return self._link(self._make())
        except Exception:
            closers[0]()
            raise

    def close(self) -> None:
        closers, self._closers = self._closers, []
        for closer in closers:
            closer()


class PipeLinkMaker:
    """See `LinkMaker`.

    Args:
        backends: those that may be used here, best first.
        connect_timeout_s: of `dial`, with each backend.
    """

    def __init__(self, shape: ChannelShape, backends: tuple[str, ...], connect_timeout_s: float) -> None:
        self._shape = shape
        self._backends = backends
        self._connect_timeout_s = connect_timeout_s
        self._waiter = Waiter()
        self._incarnation = draw_incarnation()
        self._links: set[PipeLink] = set()
        self._closed = False

    def dial(self, addresses: dict[str, str], peer: str) -> Dialled:
        lost: list[str] = []
        for backend in self._backends:
            if backend not in addresses:
                continue
            dial = self._over_shm if backend == SHM else self._over_tcp
            try:
                return PipeDialled(*dial(addresses[backend], peer), lambda pipe: self._link(pipe, peer))
            except PeerLost as error:  # another host, perhaps: the next backend may reach it
                lost.append(str(error))
        if lost:
            raise PeerLost(f"FFN node {peer}: {'; '.join(lost)}")
        raise TransportUnavailable(
            f"FFN node {peer} offers {', '.join(sorted(addresses)) or 'nothing'}, this rank has "
            f"{', '.join(self._backends)}: set ffn_transport alike"
        )

    def _link(self, pipe: Pipe, peer: str) -> Link:
        link = PipeLink(pipe, self._shape, peer, self._incarnation, self._links.discard)
        self._links.add(link)
        return link

    def wait(self, timeout_s: float) -> None:
        self._waiter.wait(timeout_s)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for link in list(self._links):
                link.close()
            self._waiter.close()

    def _opener(self, incarnation: int) -> Opener:
        return opener(Kind.ANSWER, incarnation, max_answer_bytes(self._shape) - HEADER_BYTES)

    def _over_tcp(self, address: str, peer: str) -> Reached:
        sock, welcome = dial(TCP, TCP_KIND, address, introduce(self._shape, self._incarnation), self._connect_timeout_s)
        try:
            incarnation = read_welcome(welcome, self._shape, peer)
        except Exception:
            sock.close()
            raise
        return [sock.close], lambda: TcpPipe(
            sock,
            num_in=1,
            in_bytes=max_answer_bytes(self._shape),
            num_out=self._shape.num_slots,
            out_bytes=max_call_bytes(self._shape),
            peer=peer,
            waiter=self._waiter,
            opener=self._opener(incarnation),
        )

    def _over_shm(self, address: str, peer: str) -> Reached:
        introduction = introduce(self._shape, self._incarnation)
        sock, welcome, fd = dial_shm(address, introduction, self._connect_timeout_s)
        try:
            incarnation = read_welcome(welcome, self._shape, peer)
            if fd is None:
                raise MalformedMessage(f"FFN node {peer} sent no segment")
            layout = layout_of(self._shape)
            check_segment(fd, layout)
        except Exception:
            sock.close()
            if fd is not None:
                os.close(fd)
            raise
        return [sock.close, lambda: os.close(fd)], lambda: self._shm_pipe(sock, fd, layout, peer, incarnation)

    def _shm_pipe(self, sock: socket.socket, fd: int, layout: Layout, peer: str, incarnation: int) -> Pipe:
        try:
            return ShmPipe(
                sock, fd, layout, answers=False, peer=peer, waiter=self._waiter, opener=self._opener(incarnation)
            )
        finally:
            os.close(fd)
