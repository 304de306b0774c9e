"""How a link in shared memory begins: a Unix socket in a folder that no other user may enter, and a segment over it."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from pathlib import Path

from anabranch.errors import (
    ConfigError,
    DeadlineExceeded,
    MalformedMessage,
    PeerLost,
    TransportError,
    TransportUnavailable,
)
from anabranch.system.clock import awake_s
from anabranch.system.private_files import runtime_folder
from transport.collectives.segment import make_segment
from transport.m2n.base import ChannelShape
from transport.m2n.ends import Reached, Terms, send_welcome
from transport.m2n.hello import SHM_KIND, Hello, introduce, read_welcome, reply
from transport.m2n.pipe import Pipe
from transport.m2n.shm_pipe import ShmPipe, check_segment, layout_of
from transport.m2n.tcp_ends import BACKLOG
from transport.m2n.waiter import Waiter
from transport.planes.handshake import NO_TOKEN, TOKEN_BYTES, HelloReader, Introduction, encode

SHM = "shm"
_MAX_FDS = 4


class ShmDoor:
    """See `Door`. Raises TransportUnavailable."""

    name = SHM
    kind = SHM_KIND

    def __init__(self) -> None:
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._path = runtime_folder() / "m2n.sock"
        self.address = f"{SHM}:{self.token.hex()}:{self._path}"
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.bind(str(self._path))
            self.sock.listen(BACKLOG)
        except OSError as error:
            self.close()
            raise TransportUnavailable(f"cannot listen on {self._path}: {error}") from error
        self.sock.setblocking(False)

    def admit(self, sock: socket.socket, hello: Hello, terms: Terms, incarnation: int, waiter: Waiter) -> Pipe:
        layout = layout_of(terms.shape)
        fd = make_segment(layout.total)
        try:
            pipe = ShmPipe(sock, fd, layout, terms, waiter)
            try:
                send_welcome(sock, SHM_KIND, reply(incarnation), fd)
            except (OSError, PeerLost):
                pipe.close()
                raise
            return pipe
        finally:
            os.close(fd)

    def close(self) -> None:
        self.sock.close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._path.parent.rmdir()


class ShmReached:
    """See `Reached`."""

    def __init__(self, sock: socket.socket, fd: int, incarnation: int) -> None:
        self.incarnation = incarnation
        self._sock = sock
        self._fd = fd

    def make_pipe(self, terms: Terms, waiter: Waiter) -> Pipe:
        pipe = ShmPipe(self._sock, self._fd, layout_of(terms.shape), terms, waiter)
        os.close(self._fd)
        return pipe

    def close(self) -> None:
        self._sock.close()
        os.close(self._fd)


class ShmDialler:
    """See `Dialler`."""

    name = SHM

    def dial(self, address: str, shape: ChannelShape, incarnation: int, peer: str, timeout_s: float) -> Reached:
        sock, welcome, fd = dial_shm(address, introduce(shape, incarnation), timeout_s)
        try:
            node = read_welcome(welcome, shape, peer).incarnation
            if fd is None:
                raise MalformedMessage(f"FFN node {peer} sent no segment")
            check_segment(fd, layout_of(shape))
            return ShmReached(sock, fd, node)
        except BaseException:
            sock.close()
            if fd is not None:
                os.close(fd)
            raise


def dial_shm(
    address: str, introduction: Introduction, timeout_s: float
) -> tuple[socket.socket, Introduction, int | None]:
    """Connect, show the token, wait for the welcome and the segment that comes with it.

    Returns:
        The socket, non-blocking; what the node said; the segment's descriptor, None where it refuses.

    Raises:
        PeerLost, DeadlineExceeded, MalformedMessage.
    """
    path, token = parse_shm_address(address)
    deadline = awake_s() + timeout_s
    fds: list[int] = []
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
        sock.sendall(encode(SHM_KIND, token, introduction))
        reader = HelloReader(SHM_KIND, NO_TOKEN)
        welcome: Introduction | None = None
        while welcome is None:
            sock.settimeout(max(0.001, deadline - awake_s()))
            try:
                data, more, _, _ = socket.recv_fds(sock, reader.num_missing, _MAX_FDS)
            except TimeoutError:
                if awake_s() < deadline:  # this process was stopped meanwhile
                    continue
                raise
            fds += more
            if not data:
                raise PeerLost(f"{SHM} peer at {path} refused the connection")
            welcome = reader.feed(data)
        if len(fds) > 1:
            raise MalformedMessage(f"{len(fds)} descriptors with a welcome, at most one")
        sock.setblocking(False)
        return sock, welcome, fds[0] if fds else None
    except TimeoutError:
        error: TransportError | DeadlineExceeded = DeadlineExceeded(
            f"connecting to {SHM} peer at {path}: connect_timeout_s = {timeout_s} s"
        )
    except OSError as failed:
        error = PeerLost(f"{SHM} peer at {path}: {failed}")
    except TransportError as failed:
        error = failed
    sock.close()
    for fd in fds:
        os.close(fd)
    raise error


def parse_shm_address(address: str) -> tuple[Path, bytes]:
    """The socket's path and the token. Raises ConfigError."""
    scheme, _, rest = address.partition(":")
    token, _, path = rest.partition(":")
    try:
        secret = bytes.fromhex(token)
    except ValueError:
        secret = b""
    if scheme != SHM or len(secret) != TOKEN_BYTES or not path:
        raise ConfigError("address", address, f"must be {SHM}:TOKEN:PATH")
    return Path(path), secret
