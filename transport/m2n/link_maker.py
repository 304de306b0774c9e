"""An attention rank's end of the channel: its links, and one wait for all of them."""

from __future__ import annotations

import os

from anabranch.errors import MalformedMessage, PeerLost, TransportUnavailable
from transport.m2n.base import ChannelShape, Link
from transport.m2n.dial import dial_shm
from transport.m2n.doors import SHM, TCP
from transport.m2n.header import HEADER_BYTES, Kind, max_answer_bytes, max_call_bytes, opener
from transport.m2n.hello import TCP_KIND, draw_incarnation, introduce, read_welcome
from transport.m2n.link import PipeLink
from transport.m2n.pipe import Opener, Pipe
from transport.m2n.shm_pipe import ShmPipe, check_segment, layout_of
from transport.m2n.tcp_pipe import TcpPipe
from transport.m2n.waiter import Waiter
from transport.planes.handshake import dial


class PipeLinkMaker:
    """See `LinkMaker`.

    Args:
        backends: those that may be used here, best first.
        connect_timeout_s: of `connect`, with each backend.
    """

    def __init__(self, shape: ChannelShape, backends: tuple[str, ...], connect_timeout_s: float) -> None:
        self._shape = shape
        self._backends = backends
        self._connect_timeout_s = connect_timeout_s
        self._waiter = Waiter()
        self._incarnation = draw_incarnation()
        self._links: set[PipeLink] = set()
        self._closed = False

    def connect(self, addresses: dict[str, str], peer: str) -> Link:
        lost: list[str] = []
        for backend in self._backends:
            if backend not in addresses:
                continue
            make = self._over_shm if backend == SHM else self._over_tcp
            try:
                pipe = make(addresses[backend], peer)
            except PeerLost as error:  # another host, perhaps: the next backend may reach it
                lost.append(str(error))
                continue
            link = PipeLink(pipe, self._shape, peer, self._incarnation, self._links.discard)
            self._links.add(link)
            return link
        if lost:
            raise PeerLost(f"FFN node {peer}: {'; '.join(lost)}")
        raise TransportUnavailable(
            f"FFN node {peer} offers {', '.join(sorted(addresses)) or 'nothing'}, this rank has "
            f"{', '.join(self._backends)}: set ffn_transport alike"
        )

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

    def _over_tcp(self, address: str, peer: str) -> Pipe:
        sock, welcome = dial(TCP, TCP_KIND, address, introduce(self._shape, self._incarnation), self._connect_timeout_s)
        try:
            incarnation = read_welcome(welcome, self._shape, peer)
        except Exception:
            sock.close()
            raise
        return TcpPipe(
            sock,
            num_in=1,
            in_bytes=max_answer_bytes(self._shape),
            num_out=self._shape.num_slots,
            out_bytes=max_call_bytes(self._shape),
            peer=peer,
            waiter=self._waiter,
            opener=self._opener(incarnation),
        )

    def _over_shm(self, address: str, peer: str) -> Pipe:
        introduction = introduce(self._shape, self._incarnation)
        sock, welcome, fd = dial_shm(address, introduction, self._connect_timeout_s)
        try:
            incarnation = read_welcome(welcome, self._shape, peer)
            if fd is None:
                raise MalformedMessage(f"FFN node {peer} sent no segment")
            layout = layout_of(self._shape)
            check_segment(fd, layout)
            return ShmPipe(
                sock, fd, layout, answers=False, peer=peer, waiter=self._waiter, opener=self._opener(incarnation)
            )
        except Exception:
            sock.close()
            raise
        finally:
            if fd is not None:
                os.close(fd)
