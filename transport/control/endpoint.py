"""Addresses of the control channel: `ipc://PATH`, a Unix socket, or `tcp://HOST:PORT`."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from dataclasses import dataclass

from anabranch.errors import ConfigError, TransportUnavailable
from anabranch.system.hosts import is_loopback

BACKLOG = 128
# A peer whose machine is gone is noticed by the kernel after about KEEPALIVE_IDLE_S + 3 * KEEPALIVE_INTERVAL_S.
KEEPALIVE_IDLE_S = 10
KEEPALIVE_INTERVAL_S = 3
KEEPALIVE_PROBES = 3


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An address; `path` is empty for TCP, `host` for a Unix socket."""

    path: str = ""
    host: str = ""
    port: int = 0

    @property
    def is_tcp(self) -> bool:
        return not self.path

    @property
    def is_local(self) -> bool:
        """Whether it can be reached from this machine alone."""
        return not self.is_tcp or is_loopback(self.host)

    def __str__(self) -> str:
        if not self.is_tcp:
            return f"ipc://{self.path}"
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


def parse_endpoint(key: str, text: str) -> Endpoint:
    """Raises ConfigError, which names `key`."""
    scheme, _, rest = text.partition("://")
    if scheme == "ipc" and rest and "\0" not in rest:
        return Endpoint(path=rest)
    host, _, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if scheme != "tcp" or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(key, text, "must be tcp://HOST:PORT or ipc://PATH")
    try:
        host.encode("idna")  # as every resolver does
    except UnicodeError as error:
        raise ConfigError(key, text, f"its host is no name or address: {error}") from None
    return Endpoint(host=host, port=int(port))


def check_secret(key: str, endpoint: Endpoint, secret: bytes) -> None:
    """Refuse TCP without a secret: any process that reaches the port could speak. Raises ConfigError."""
    if endpoint.is_tcp and not secret:
        raise ConfigError(
            key,
            str(endpoint),
            "needs a secret_file that the orchestrator and all workers are given; on one machine, ipc needs none",
        )


def listen(key: str, endpoint: Endpoint) -> socket.socket:
    """A socket that listens; a Unix socket is open to this user alone.

    Raises:
        ConfigError: the address is none.
        TransportUnavailable: it is taken, or may not be taken.
    """
    try:
        if not endpoint.is_tcp:
            return _listen_unix(endpoint.path)
        family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
        return socket.create_server((endpoint.host, endpoint.port), family=family, backlog=BACKLOG)
    except (socket.gaierror, FileNotFoundError, NotADirectoryError, ValueError, UnicodeError) as error:
        raise ConfigError(key, str(endpoint), f"is no address that can be bound: {error}") from error
    except OSError as error:
        if "too long" in str(error):
            raise ConfigError(key, str(endpoint), "is too long for a socket; choose a shorter path") from error
        raise TransportUnavailable(f"cannot bind {endpoint}: {error}") from error


def _listen_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(path)
        # Before it listens, so that nobody else can have connected.
        os.chmod(path, 0o600)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Remove the socket of a process that has ended; one that lives, and any other file, is left for bind to refuse."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            except OSError:  # it lives and is busy, or belongs to another user
                return


def bound(endpoint: Endpoint, listener: socket.socket) -> Endpoint:
    """The endpoint with the port that the system chose."""
    return Endpoint(host=endpoint.host, port=listener.getsockname()[1]) if endpoint.is_tcp else endpoint


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel notice a peer whose machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
