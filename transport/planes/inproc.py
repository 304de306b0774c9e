"""The in-process plane: one memory copy between two planes of one process, with a thread for each plane."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import secrets
import threading
from concurrent.futures import Future

import numpy as np

from anabranch.errors import MalformedMessage, PeerLost, TransportError
from transport.planes import futures
from transport.planes.base import Link, PlaneHandler, too_large

logger = logging.getLogger(__name__)

SCHEME = "inproc"
JOIN_TIMEOUT_S = 10.0

_registry: dict[str, InprocPlane] = {}
_registry_lock = threading.Lock()
_numbers = itertools.count()


def is_local(address: str) -> bool:
    """Whether `address` is a plane of this process that is open."""
    with _registry_lock:
        return address in _registry and address.split(":")[1] == str(os.getpid())


class InprocLink:
    """One end of a pair; what is sent on one end is delivered by the other end's plane."""

    def __init__(self, plane: InprocPlane, peer: str) -> None:
        self.peer = peer
        self.plane = plane
        self.other: InprocLink | None = None
        self.error: Exception | None = None

    def send(self, header: bytes, payload: memoryview | None = None) -> Future[None]:
        refusal = too_large(header, payload)
        if refusal is not None:
            return futures.failed(refusal)
        future: Future[None] = Future()
        other = self.other
        if self.error is not None or other is None:
            futures.fail(future, self.error or PeerLost("link is not connected"))
        elif not other.plane.post(_Message(other, bytes(header), payload, future)):
            futures.fail(future, PeerLost(f"{self.peer} is closed"))
        return future

    def close(self) -> None:
        self.plane.post(_Loss(self, PeerLost(f"link to {self.peer} closed at this end")))
        if self.other is not None:
            self.other.plane.post(_Loss(self.other, PeerLost(f"{self.other.peer} closed the link")))


class _Message:
    __slots__ = ("future", "header", "link", "payload")

    def __init__(self, link: InprocLink, header: bytes, payload: memoryview | None, future: Future[None]) -> None:
        self.link = link
        self.header = header
        self.payload = payload
        self.future = future


class _Loss:
    __slots__ = ("error", "link")

    def __init__(self, link: InprocLink, error: Exception) -> None:
        self.link = link
        self.error = error


class InprocPlane:
    """The plane between workers of one process."""

    name = SCHEME

    def __init__(self, handler: PlaneHandler) -> None:
        self.handler = handler
        self._address = f"{SCHEME}:{os.getpid()}:{secrets.token_hex(8)}:{next(_numbers)}"
        self._queue: queue.SimpleQueue[_Message | _Loss | None] = queue.SimpleQueue()
        self._links: set[InprocLink] = set()
        self._lock = threading.Lock()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="plane-inproc", daemon=True)
        with _registry_lock:
            _registry[self._address] = self
        self._thread.start()

    @property
    def address(self) -> str:
        return self._address

    def connect(self, address: str, timeout_s: float) -> Link:
        with _registry_lock:
            target = _registry.get(address)
        if target is None or not is_local(address):
            raise PeerLost(f"no in-process plane {address} here")
        ours, theirs = InprocLink(self, address), InprocLink(target, self._address)
        ours.other, theirs.other = theirs, ours
        if not self._adopt(ours) or not target._adopt(theirs):
            with self._lock:
                self._links.discard(ours)
            raise PeerLost(f"in-process plane {address} is closed")
        return ours

    def close(self) -> None:
        with _registry_lock:
            _registry.pop(self._address, None)
        with self._lock:
            if not self._open:
                return
            self._open = False
            links = list(self._links)
            for link in links:
                self._queue.put(_Loss(link, PeerLost("this plane is closed")))
            self._queue.put(None)
        for link in links:
            if link.other is not None:
                link.other.plane.post(_Loss(link.other, PeerLost(f"{link.other.peer} is closed")))
        self._thread.join(JOIN_TIMEOUT_S)

    def post(self, item: _Message | _Loss) -> bool:
        """Queue for the progress thread; False once the plane is closed."""
        with self._lock:
            if self._open:
                self._queue.put(item)
            return self._open

    def _adopt(self, link: InprocLink) -> bool:
        with self._lock:
            if self._open:
                self._links.add(link)
            return self._open

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, _Loss):
                self._lose(item.link, item.error)
            else:
                self._deliver(item)

    def _lose(self, link: InprocLink, error: Exception) -> None:
        if link.error is not None:
            return
        link.error = error
        with self._lock:
            self._links.discard(link)
        try:
            self.handler.on_lost(link, error)
        except Exception:
            logger.exception("on_lost failed")

    def _deliver(self, message: _Message) -> None:
        link, payload = message.link, message.payload
        if link.error is not None:
            futures.fail(message.future, PeerLost(f"{link.plane.address} closed the link"))
            return
        num_bytes = payload.nbytes if payload is not None else 0
        try:
            buffer = self.handler.on_header(link, message.header, num_bytes)
            if buffer is not None and payload is not None and num_bytes:
                if buffer.nbytes != num_bytes:
                    raise MalformedMessage(f"handler gave {buffer.nbytes} bytes for a payload of {num_bytes}")
                # numpy lets other threads run while it copies.
                np.copyto(np.frombuffer(buffer, np.uint8), np.frombuffer(payload.cast("B"), np.uint8))
                self.handler.on_payload(link, message.header, buffer)
        except Exception as error:
            if not isinstance(error, TransportError):
                logger.exception("handler failed; the link is closed")
            futures.fail(message.future, PeerLost(f"{link.plane.address} closed the link: {error}"))
            self._lose(link, error)
            if link.other is not None:
                link.other.plane.post(_Loss(link.other, PeerLost(f"{link.other.peer} closed the link: {error}")))
            return
        futures.succeed(message.future)
