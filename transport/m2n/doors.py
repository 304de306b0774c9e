"""Where a node listens: a TCP port, and a Unix socket in a folder that no other user may enter."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

from anabranch.errors import ConfigError, TransportUnavailable
from anabranch.system.private_files import runtime_folder
from transport.m2n.hello import SHM_KIND, TCP_KIND
from transport.planes.handshake import TOKEN_BYTES, format_address

TCP, SHM = "tcp", "shm"
_BACKLOG = 128


class Door:
    """A listening socket.

    Attributes:
        name: of the backend.
        kind, token: what a hello must show.
        address: what a rank passes to `LinkMaker.connect`.
    """

    def __init__(
        self, name: str, kind: int, sock: socket.socket, token: bytes, address: str, cleanup: Callable[[], None]
    ) -> None:
        self.name = name
        self.kind = kind
        self.sock = sock
        self.token = token
        self.address = address
        self._cleanup = cleanup

    def close(self) -> None:
        self.sock.close()
        self._cleanup()


def open_tcp_door(listen_host: str) -> Door:
    """Raises TransportUnavailable."""
    token = secrets.token_bytes(TOKEN_BYTES)
    try:
        family = socket.getaddrinfo(listen_host, 0, type=socket.SOCK_STREAM)[0][0]
        sock = socket.create_server((listen_host, 0), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise TransportUnavailable(f"cannot listen on {listen_host}: {error}; set listen_host") from error
    sock.setblocking(False)
    address = format_address(TCP, listen_host, sock.getsockname()[1], token)
    return Door(TCP, TCP_KIND, sock, token, address, lambda: None)


def open_shm_door() -> Door:
    """Raises TransportUnavailable."""
    token = secrets.token_bytes(TOKEN_BYTES)
    folder = runtime_folder()
    path = folder / "m2n.sock"

    def remove() -> None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            folder.rmdir()

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        remove()
        raise TransportUnavailable(f"cannot listen on {path}: {error}") from error
    sock.setblocking(False)
    return Door(SHM, SHM_KIND, sock, token, f"{SHM}:{token.hex()}:{path}", remove)


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
