"""A node's end of the channel: doors that links come through, and the links."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Sequence

from anabranch.errors import TransportError, TransportUnavailable
from anabranch.system.logs import LimitedLog
from transport.m2n.acceptor import Acceptor
from transport.m2n.base import Arrived, ChannelShape
from transport.m2n.ends import Door, Terms, send_welcome
from transport.m2n.hello import LINKS, Refused, draw_incarnation, read_hello, reply
from transport.m2n.messages import Answer
from transport.m2n.served import Pending, ServedLink
from transport.m2n.waiter import Waiter
from transport.planes.handshake import Introduction

logger = logging.getLogger(__name__)

MAX_LINKS = 256


class PipeListener:
    """See `Listener`.

    Args:
        shape: what this node serves; a rank brings its own `max_rows` and `num_slots`, within bounds.
        doors: closed with the listener.
    """

    def __init__(self, shape: ChannelShape, doors: Sequence[Door]) -> None:
        self._shape = shape
        self._waiter = Waiter()
        self._log = LimitedLog(logger)
        self._incarnation = draw_incarnation()
        self._links: dict[int, ServedLink] = {}
        self._num_made = 0
        self._woken = False
        self._closed = False
        self._waking = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waiter.watch(self._wake, select.EPOLLIN, self._wakes)
        self._addresses = {door.name: door.address for door in doors}
        self._acceptor = Acceptor(doors, self._waiter, self._admit)

    @property
    def addresses(self) -> dict[str, str]:
        return self._addresses

    @property
    def num_links(self) -> int:
        return len(self._links)

    def poll(self) -> Sequence[Arrived]:
        self._waiter.look_sometimes()
        self._acceptor.expire()
        now_s = time.monotonic()
        arrived: list[Arrived] = []
        for link in list(self._links.values()):
            try:
                arrived += link.poll(now_s)
            except TransportError as error:
                self._drop(link, error)
        return arrived

    def answer(self, arrived: Arrived, answer: Answer) -> None:
        pending = arrived.token
        assert isinstance(pending, Pending)
        try:
            pending.link.answer(arrived, pending, answer)
        except TransportError as error:
            self._drop(pending.link, error)

    def wait(self, timeout_s: float) -> None:
        if self._woken:
            self._woken = False
            return
        self._waiter.wait(min(timeout_s, self._acceptor.expire()))
        self._woken = False

    def wake(self) -> None:
        # Not after `close`: the number may be another descriptor's by then.
        with self._waking, contextlib.suppress(BlockingIOError):
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def _wakes(self, events: int) -> bool:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        self._woken = True
        return True

    def close(self) -> None:
        with self._waking:
            if self._closed:
                return
            self._closed = True
        for link in list(self._links.values()):
            link.close()
        self._links.clear()
        self._acceptor.close()
        self._waiter.forget(self._wake)
        os.close(self._wake)
        self._waiter.close()

    def _drop(self, link: ServedLink, error: TransportError) -> None:
        if self._links.pop(link.number, None) is not None:
            self._log.warning(f"link {link.number} from {link.peer} ends: {error}")
            link.close()

    def _admit(self, door: Door, sock: socket.socket, introduction: Introduction) -> None:
        """Answer a hello and make its link. Raises TransportError, OSError: the socket is to be closed."""
        try:
            if len(self._links) >= MAX_LINKS:
                raise Refused(LINKS, len(self._links), f"it has {MAX_LINKS}")
            hello, shape = read_hello(introduction, self._shape)
        except Refused as refused:
            send_welcome(sock, door.kind, reply(self._incarnation, refused.field, refused.reason))
            raise TransportUnavailable(f"{introduction.name}: {refused}") from None
        terms = Terms(shape=shape, answers=True, peer=introduction.name, peer_incarnation=hello.incarnation)
        pipe = door.admit(sock, hello, terms, self._incarnation, self._waiter)
        number = self._num_made
        self._num_made += 1
        self._links[number] = ServedLink(pipe, shape, number, terms.peer, self._incarnation, self._log)
