"""Takes connections and reads their hellos, without a thread: strangers are closed at their first wrong bytes."""

from __future__ import annotations

import logging
import select
import socket
from collections.abc import Callable, Sequence

from anabranch.errors import PeerLost, TransportError
from anabranch.system.clock import awake_s
from anabranch.system.logs import LimitedLog
from transport.m2n.ends import Door
from transport.m2n.waiter import Waiter
from transport.planes.handshake import (
    ACCEPT_PAUSE_S,
    HELLO_TIMEOUT_S,
    MAX_PENDING_HELLOS,
    HelloReader,
    Introduction,
)

logger = logging.getLogger(__name__)

FAR_S = 3600.0


class Acceptor:
    """Those who have connected and not said hello yet.

    Args:
        admit: takes a non-blocking socket over, with its door and what the peer said; raises to have it closed.
    """

    def __init__(
        self, doors: Sequence[Door], waiter: Waiter, admit: Callable[[Door, socket.socket, Introduction], None]
    ) -> None:
        self._doors = doors
        self._waiter = waiter
        self._admit = admit
        self._log = LimitedLog(logger)
        self._pending: dict[socket.socket, tuple[Door, HelloReader, float]] = {}
        # When doors that were shut for want of descriptors open again.
        self._opens_s: dict[Door, float] = {}
        for door in doors:
            self._open(door)

    def _open(self, door: Door) -> None:
        self._waiter.watch(door.sock.fileno(), select.EPOLLIN, lambda events: self._accept(door))

    def expire(self) -> float:
        """Close those who are late; seconds until the next one is."""
        if not self._pending and not self._opens_s:
            return FAR_S
        now = awake_s()
        for sock in [sock for sock, (_, _, deadline) in self._pending.items() if deadline <= now]:
            self._refuse(sock, f"no hello within {HELLO_TIMEOUT_S} s")
        for door in [door for door, opens in self._opens_s.items() if opens <= now]:
            del self._opens_s[door]
            self._open(door)
        left = [deadline - now for _, _, deadline in self._pending.values()]
        left += [opens - now for opens in self._opens_s.values()]
        return min(left, default=FAR_S)

    def _accept(self, door: Door) -> bool:
        try:
            sock, _ = door.sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        except OSError as error:  # out of descriptors: those who wait in the backlog are served later
            self._log.warning(f"{door.name}: accept failed: {error}")
            self._waiter.forget(door.sock.fileno())
            self._opens_s[door] = awake_s() + ACCEPT_PAUSE_S
            return False
        if len(self._pending) >= MAX_PENDING_HELLOS:
            # The oldest has had its chance; a flood of silent connections must not keep real peers out.
            self._refuse(next(iter(self._pending)), "too many connections that say nothing")
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pending[sock] = (door, HelloReader(door.kind, door.token), awake_s() + HELLO_TIMEOUT_S)
        self._waiter.watch(sock.fileno(), select.EPOLLIN, lambda events: self._read(sock))
        return False

    def _read(self, sock: socket.socket) -> bool:
        door, reader, _ = self._pending[sock]
        try:
            data = sock.recv(reader.num_missing)
            if not data:
                raise PeerLost("gone before its hello was complete")
            hello = reader.feed(data)
            if hello is None:
                return False
            self._forget(sock)
            self._admit(door, sock, hello)
        except BlockingIOError:
            return False
        except (OSError, TransportError) as error:
            self._refuse(sock, str(error))
            return False
        return True

    def _refuse(self, sock: socket.socket, reason: str) -> None:
        self._log.warning(f"connection refused: {reason}")
        self._forget(sock)
        sock.close()

    def _forget(self, sock: socket.socket) -> None:
        if self._pending.pop(sock, None) is not None:
            self._waiter.forget(sock.fileno())

    def close(self) -> None:
        for sock in list(self._pending):
            self._forget(sock)
            sock.close()
        for door in self._doors:
            self._waiter.forget(door.sock.fileno())
            door.close()
