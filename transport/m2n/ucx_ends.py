"""How a link over UCX begins: a TCP connection joins the ends, over which they exchange the addresses of UCX workers.

That connection stays open: the kernel closes it when a process ends, which UCX does not notice within a host.
"""

from __future__ import annotations

import secrets
import socket

from anabranch.errors import PeerLost, TransportUnavailable
from transport.m2n.base import ChannelShape
from transport.m2n.ends import Reached, Terms, send_welcome
from transport.m2n.hello import UCX_KIND, Hello, introduce, read_welcome, reply
from transport.m2n.pipe import Pipe
from transport.m2n.tcp_ends import listen
from transport.m2n.ucx_pipe import UcxPipe, UcxWay
from transport.m2n.waiter import Waiter
from transport.planes.handshake import TOKEN_BYTES, dial, format_address
from transport.ucx.api import make_context, make_worker, transports_for

UCX = "ucx"


class UcxDoor:
    """See `Door`.

    Args:
        listen_host: beyond loopback UCX's own transports listen as well.

    Raises:
        TransportUnavailable: it cannot listen, or UCX does not start.
    """

    name = UCX
    kind = UCX_KIND

    def __init__(self, listen_host: str) -> None:
        self._context = make_context(transports_for(listen_host))
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.sock = listen(listen_host)
        self.address = format_address(UCX, listen_host, self.sock.getsockname()[1], self.token)

    def admit(self, sock: socket.socket, hello: Hello, terms: Terms, incarnation: int, waiter: Waiter) -> Pipe:
        worker = make_worker(self._context)
        pipe = UcxPipe(sock, UcxWay(worker, hello.ucx_address, terms.peer), terms, waiter)
        try:
            send_welcome(sock, UCX_KIND, reply(incarnation, ucx_address=worker.address.tobytes()))
        except (OSError, PeerLost):
            pipe.close()
            raise
        return pipe

    def close(self) -> None:
        self.sock.close()


class UcxReached:
    """See `Reached`."""

    def __init__(self, sock: socket.socket, way: UcxWay, incarnation: int) -> None:
        self.incarnation = incarnation
        self._sock = sock
        self._way: UcxWay | None = way

    def make_pipe(self, terms: Terms, waiter: Waiter) -> Pipe:
        way, self._way = self._way, None
        assert way is not None
        return UcxPipe(self._sock, way, terms, waiter)

    def close(self) -> None:
        self._sock.close()
        way, self._way = self._way, None
        if way is not None:
            way.close([])


class UcxDialler:
    """See `Dialler`. Raises TransportUnavailable where UCX does not start."""

    name = UCX

    def __init__(self, listen_host: str) -> None:
        self._context = make_context(transports_for(listen_host))

    def dial(self, address: str, shape: ChannelShape, incarnation: int, peer: str, timeout_s: float) -> Reached:
        worker = make_worker(self._context)
        hello = introduce(shape, incarnation, worker.address.tobytes())
        sock, introduction = dial(UCX, UCX_KIND, address, hello, timeout_s)
        try:
            welcome = read_welcome(introduction, shape, peer)
            try:
                way = UcxWay(worker, welcome.ucx_address, peer)
            except TransportUnavailable as error:  # the next backend may reach it
                raise PeerLost(str(error)) from error
            return UcxReached(sock, way, welcome.incarnation)
        except BaseException:
            sock.close()
            raise
