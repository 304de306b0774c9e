"""How a link begins: the connector shows the plane's token, both say who they are.

    connector -> acceptor    hello: magic, version, plane kind, token, body
    acceptor -> connector    welcome: magic, version, plane kind, zero token, body

A stranger's connection is closed at its first wrong bytes, or when its hello is not complete in time.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import selectors
import socket
import struct
from collections.abc import Callable

import msgspec

from anabranch.errors import (
    ConfigError,
    DeadlineExceeded,
    MalformedMessage,
    PeerLost,
    TransportError,
    TransportUnavailable,
)
from anabranch.system.clock import awake_s
from anabranch.system.logs import LimitedLog
from transport.planes.loop import ProgressLoop

logger = logging.getLogger(__name__)

MAGIC = b"ANBP"
VERSION = 1
MAX_BODY_BYTES = 64 * 1024
MAX_PENDING_HELLOS = 64
HELLO_TIMEOUT_S = 5.0
ACCEPT_PAUSE_S = 0.1
TOKEN_BYTES = 16

_PREFIX = struct.Struct("!4sBBH16sI")


class Introduction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of hello and welcome.

    Attributes:
        name: for logs: host and process id.
        endpoint: what the plane needs to reach the other end (UCX: the worker's address).
    """

    name: str
    endpoint: bytes = b""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Introduction)


def my_name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def encode(kind: int, token: bytes, introduction: Introduction) -> bytes:
    body = _encoder.encode(introduction)
    return _PREFIX.pack(MAGIC, VERSION, kind, 0, token, len(body)) + body


def format_address(scheme: str, host: str, port: int, token: bytes) -> str:
    return f"{scheme}:{host}:{port}:{token.hex()}"


def parse_address(scheme: str, address: str) -> tuple[str, int, bytes]:
    """Host, port and token. Raises ConfigError."""
    try:
        head, port, token = address.rsplit(":", 2)
        found, host = head.split(":", 1)
        number, secret = int(port), bytes.fromhex(token)
    except ValueError:
        raise ConfigError("address", address, f"must be {scheme}:HOST:PORT:TOKEN") from None
    if found != scheme or not 0 < number < 65536 or len(secret) != TOKEN_BYTES:
        raise ConfigError("address", address, f"must be {scheme}:HOST:PORT:TOKEN")
    return host, number, secret


class HelloReader:
    """Collects one hello or welcome from a stream, refusing it as early as its bytes allow.

    Args:
        kind: the plane kind that must be named.
        token: what must be shown.
    """

    def __init__(self, kind: int, token: bytes) -> None:
        self._kind = kind
        self._token = token
        self._data = bytearray()

    @property
    def num_missing(self) -> int:
        """Bytes to read next, never more than belong to the introduction."""
        if len(self._data) < _PREFIX.size:
            return _PREFIX.size - len(self._data)
        return _PREFIX.size + self._body_bytes() - len(self._data)

    def _body_bytes(self) -> int:
        return int(_PREFIX.unpack_from(self._data)[5])

    def feed(self, data: bytes) -> Introduction | None:
        """The introduction once it is complete. Raises MalformedMessage."""
        self._data += data
        known = min(len(self._data), len(MAGIC))
        if self._data[:known] != MAGIC[:known]:
            raise MalformedMessage("not an Anabranch plane")
        if len(self._data) < _PREFIX.size:
            return None
        _, version, kind, _, token, body_bytes = _PREFIX.unpack_from(self._data)
        if version != VERSION:
            raise MalformedMessage(f"plane protocol {version}, this end speaks {VERSION}")
        if kind != self._kind or not hmac.compare_digest(token, self._token):
            raise MalformedMessage("wrong plane or token")
        if body_bytes > MAX_BODY_BYTES:
            raise MalformedMessage(f"introduction of {body_bytes} bytes, at most {MAX_BODY_BYTES}")
        if len(self._data) < _PREFIX.size + body_bytes:
            return None
        try:
            return _decoder.decode(bytes(self._data[_PREFIX.size :]))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MalformedMessage(f"introduction: {error}") from None


NO_TOKEN = bytes(TOKEN_BYTES)


def dial(
    scheme: str, kind: int, address: str, introduction: Introduction, timeout_s: float
) -> tuple[socket.socket, Introduction]:
    """Connect, show the token, wait for the welcome. Raises PeerLost, DeadlineExceeded, MalformedMessage."""
    host, port, token = parse_address(scheme, address)
    deadline = awake_s() + timeout_s
    sock: socket.socket | None = None
    try:
        sock = socket.create_connection((host, port), timeout=timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(encode(kind, token, introduction))
        reader = HelloReader(kind, NO_TOKEN)
        while True:
            sock.settimeout(max(0.001, deadline - awake_s()))
            try:
                data = sock.recv(reader.num_missing)
            except TimeoutError:
                if awake_s() < deadline:  # this process was stopped meanwhile
                    continue
                raise
            if not data:
                raise PeerLost(f"{scheme} peer at {host}:{port} refused the connection")
            welcome = reader.feed(data)
            if welcome is not None:
                sock.setblocking(False)
                return sock, welcome
    except TimeoutError:
        _close(sock)
        raise DeadlineExceeded(f"connecting to {scheme} peer at {host}:{port}: {timeout_s} s") from None
    except (OSError, UnicodeError) as error:  # the latter for a host that is no name
        _close(sock)
        raise PeerLost(f"{scheme} peer at {host}:{port}: {error}") from error
    except TransportError:
        _close(sock)
        raise


def _close(sock: socket.socket | None) -> None:
    if sock is not None:
        sock.close()


class Acceptor:
    """Listens on a progress loop and hands over the sockets of those who know the token.

    Args:
        admit: called on the progress thread with the socket (non-blocking) and the peer's introduction;
            answers with our own, which is sent as the welcome, or raises to refuse.
        joined: called after the welcome is on its way.
        left: called instead where an admitted peer could not be welcomed.
    """

    def __init__(
        self,
        loop: ProgressLoop,
        scheme: str,
        kind: int,
        listen_host: str,
        admit: Callable[[socket.socket, Introduction], Introduction],
        joined: Callable[[socket.socket], None],
        left: Callable[[socket.socket], None],
    ) -> None:
        self._loop = loop
        self._scheme = scheme
        self._kind = kind
        self._admit = admit
        self._joined = joined
        self._left = left
        self._log = LimitedLog(logger)
        self._accepts_again_s: float | None = None
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._pending: dict[socket.socket, tuple[HelloReader, float]] = {}
        self.num_refused = 0
        try:
            family = socket.getaddrinfo(listen_host, 0, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((listen_host, 0), family=family, backlog=128)
        except OSError as error:
            raise TransportUnavailable(f"cannot listen on {listen_host}: {error}; set listen_host") from error
        self._listener.setblocking(False)
        self.address = format_address(scheme, listen_host, self._listener.getsockname()[1], self._token)
        self._listen()

    def _listen(self) -> None:
        self._loop.watch(self._listener.fileno(), selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        """On the progress thread (or once it has ended)."""
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()
        for sock in list(self._pending):
            self._forget(sock)
            sock.close()

    def expire(self, now: float) -> float:
        """Refuse those who are late by `awake_s`; returns the seconds until the next one is."""
        late = [sock for sock, (_, deadline) in self._pending.items() if deadline <= now]
        for sock in late:
            self._refuse(sock, f"no hello within {HELLO_TIMEOUT_S} s")
        left = min((deadline - now for _, deadline in self._pending.values()), default=3600.0)
        if self._accepts_again_s is not None:
            if self._accepts_again_s <= now:
                self._accepts_again_s = None
                self._listen()
            else:
                left = min(left, self._accepts_again_s - now)
        return left

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors: those who wait in the backlog are served later
            self._log.warning(f"{self._scheme}: accept failed: {error}")
            # The links of this loop go on meanwhile.
            self._loop.unwatch(self._listener.fileno())
            self._accepts_again_s = awake_s() + ACCEPT_PAUSE_S
            return
        if len(self._pending) >= MAX_PENDING_HELLOS:
            # The oldest has had its chance; a flood of silent connections must not keep real peers out.
            self._refuse(next(iter(self._pending)), "too many connections that say nothing")
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pending[sock] = (HelloReader(self._kind, self._token), awake_s() + HELLO_TIMEOUT_S)
        self._loop.watch(sock.fileno(), selectors.EVENT_READ, lambda: self._read(sock))

    def _read(self, sock: socket.socket) -> None:
        reader, _ = self._pending[sock]
        admitted = False
        try:
            data = sock.recv(reader.num_missing)
            if not data:
                raise PeerLost("gone before its hello was complete")
            hello = reader.feed(data)
            if hello is None:
                return
            welcome = self._admit(sock, hello)
            admitted = True
            # A fresh socket's buffer holds the whole welcome (at most 64 KiB and a bit).
            if sock.send(frame := encode(self._kind, NO_TOKEN, welcome)) != len(frame):
                raise PeerLost("welcome could not be sent")
        except BlockingIOError as error:
            if admitted:
                self._refuse(sock, str(error), admitted=True)
            return
        except (OSError, TransportError) as error:
            self._refuse(sock, str(error), admitted)
            return
        except Exception as error:
            logger.exception("%s: a peer could not be admitted", self._scheme)
            self._refuse(sock, str(error), admitted)
            return
        self._forget(sock)
        self._joined(sock)

    def _refuse(self, sock: socket.socket, reason: str, admitted: bool = False) -> None:
        self.num_refused += 1
        self._log.warning(f"{self._scheme}: connection refused: {reason}")
        self._forget(sock)
        if admitted:
            self._left(sock)
        sock.close()

    def _forget(self, sock: socket.socket) -> None:
        del self._pending[sock]
        self._loop.unwatch(sock.fileno())
