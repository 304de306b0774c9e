"""How a link over TCP begins."""

from __future__ import annotations

import secrets
import socket

from anabranch.errors import TransportUnavailable
from transport.m2n.base import ChannelShape
from transport.m2n.ends import Reached, Terms, send_welcome
from transport.m2n.hello import TCP_KIND, Hello, introduce, read_welcome, reply
from transport.m2n.pipe import Pipe
from transport.m2n.tcp_pipe import TcpPipe
from transport.m2n.waiter import Waiter
from transport.planes.handshake import TOKEN_BYTES, dial, format_address

TCP = "tcp"
BACKLOG = 128


def listen(listen_host: str) -> socket.socket:
    """A listening TCP socket. Raises TransportUnavailable."""
    try:
        family = socket.getaddrinfo(listen_host, 0, type=socket.SOCK_STREAM)[0][0]
        sock = socket.create_server((listen_host, 0), family=family, backlog=BACKLOG)
    except OSError as error:
        raise TransportUnavailable(f"cannot listen on {listen_host}: {error}; set listen_host") from error
    sock.setblocking(False)
    return sock


class TcpDoor:
    """See `Door`. Raises TransportUnavailable."""

    name = TCP
    kind = TCP_KIND

    def __init__(self, listen_host: str) -> None:
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.sock = listen(listen_host)
        self.address = format_address(TCP, listen_host, self.sock.getsockname()[1], self.token)

    def admit(self, sock: socket.socket, hello: Hello, terms: Terms, incarnation: int, waiter: Waiter) -> Pipe:
        send_welcome(sock, TCP_KIND, reply(incarnation))
        return TcpPipe(sock, terms, waiter)

    def close(self) -> None:
        self.sock.close()


class TcpReached:
    """See `Reached`."""

    def __init__(self, sock: socket.socket, incarnation: int) -> None:
        self.incarnation = incarnation
        self._sock = sock

    def make_pipe(self, terms: Terms, waiter: Waiter) -> Pipe:
        return TcpPipe(self._sock, terms, waiter)

    def close(self) -> None:
        self._sock.close()


class TcpDialler:
    """See `Dialler`."""

    name = TCP

    def dial(self, address: str, shape: ChannelShape, incarnation: int, peer: str, timeout_s: float) -> Reached:
        sock, welcome = dial(TCP, TCP_KIND, address, introduce(shape, incarnation), timeout_s)
        try:
            return TcpReached(sock, read_welcome(welcome, shape, peer).incarnation)
        except BaseException:
            sock.close()
            raise
