"""One connection of the UCX plane: a UCX worker with one endpoint, and a socket that shows that the peer lives.

Each link has a UCX worker of its own, so ending a link releases all of it, whatever state the peer died in. What
goes over it is described in `ucx_envelope`.
"""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future

from anabranch.errors import DeadlineExceeded, MalformedMessage, PeerLost, TransportError
from transport.planes import futures
from transport.planes.base import too_many
from transport.planes.socket_plane import SocketPlane
from transport.planes.ucx_inbox import UcxInbox
from transport.planes.ucx_outbox import UcxOutbox
from transport.ucx.api import UcxTags, UcxWorker, load
from transport.ucx.endpoint import DRAIN_TIMEOUT_S, close_endpoint, open_endpoint

logger = logging.getLogger(__name__)


class UcxLink:
    """One connection. All but `send` and `close` run on the progress thread.

    Args:
        owner: the plane.
        heated: called when this link is to be polled.
        worker: UCX worker of this link alone.
        peer_address: the UCX address of the other end's worker.
        side: connected socket; its end is the peer's end.

    Attributes:
        hot: the owner polls this link in every turn.
        quiet_since: when polling last found something.

    Raises:
        TransportUnavailable: UCX finds no way to the peer.
    """

    def __init__(
        self,
        owner: SocketPlane[UcxLink],
        heated: Callable[[UcxLink], None],
        worker: UcxWorker,
        peer_address: bytes,
        side: socket.socket,
        peer: str,
    ) -> None:
        core = load()
        self.peer = peer
        self.hot = False
        self.quiet_since = 0.0
        self._core = core
        self._owner = owner
        self._heated = heated
        self._worker = worker
        self._side = side
        self._error: Exception | None = None
        self._endpoint = open_endpoint(worker, peer_address, peer)
        self._tags = UcxTags(envelopes=core.UCXXTag(1), payloads=core.UCXXTag(2))
        self._outbox = UcxOutbox(core, self._endpoint, self._tags, peer)
        self._inbox = UcxInbox(core, self._endpoint, self._tags, peer, self)

    # From any thread ------------------------------------------------------------------------------------

    def send(self, header: bytes, payload: memoryview | None = None) -> Future[None]:
        """See `Link.send`."""
        overrun = too_many(len(self._outbox), self.peer)
        if overrun is not None:
            self._owner.loop.call_soon(lambda: self.drop(overrun))
            return futures.failed(overrun)
        future = self._outbox.put(header, payload)
        if self._error is not None:  # after the put: either this or `drop` sees the message
            self._outbox.fail_waiting(self._error)
        elif not self.hot:  # after the put: either this or `rest` sees the message
            self._owner.loop.call_soon(self.heat)
        return future

    def close(self) -> None:
        self._owner.loop.call_soon(lambda: self.drop(PeerLost(f"link to {self.peer} closed at this end")))

    # What the inbox brings ------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether the link has been dropped."""
        return self._error is not None

    def on_header(self, header: bytes, payload_bytes: int) -> memoryview | None:
        return self._owner.handler.on_header(self, header, payload_bytes)

    def on_payload(self, header: bytes, buffer: memoryview) -> None:
        self._owner.handler.on_payload(self, header, buffer)

    # The link's life --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Watch the peer, ask for its messages."""
        self._owner.loop.watch(self._side.fileno(), selectors.EVENT_READ, self._side_ready)
        self._owner.loop.watch(self._worker.epoll_file_descriptor, selectors.EVENT_READ, self.heat)
        self._inbox.start()
        self.heat()

    def heat(self) -> None:
        """Poll this link from now on."""
        if self._error is None and not self.hot:
            self.hot = True
            self.quiet_since = time.monotonic()
            self._heated(self)

    def rest(self) -> bool:
        """Stop polling until UCX or a sender calls; False when there is something to do after all."""
        self.hot = False
        try:
            armed = self._worker.arm()
        except self._core.UCXError as error:
            self.drop(PeerLost(f"{self.peer}: {error}"))
            return True
        if not armed or self._outbox.has_work:
            self.hot = True
        return not self.hot

    def poll(self) -> bool:
        """Make progress; whether there was any."""
        if self._error is not None:
            return False
        try:
            sent = self._outbox.post()
            self._worker.progress()
            sent = self._outbox.finish() or sent
            return self._inbox.receive() or sent
        except TransportError as error:
            self.drop(error)
        except self._core.UCXError as error:
            self.drop(PeerLost(f"{self.peer}: {error}"))
        except Exception as error:
            logger.exception("%s: handler failed; the link is closed", self.peer)
            self.drop(error)
        return False

    def expire(self, now: float) -> float:
        """Drop the link if a message is late by `awake_s`; returns the seconds until one is."""
        left = 3600.0
        for deadline in (self._outbox.deadline, self._inbox.deadline):
            if deadline is not None:
                left = min(left, deadline - now)
        if left <= 0:
            self.drop(DeadlineExceeded(f"{self.peer} stalled within a message"))
            return 3600.0
        return left

    def drop(self, error: Exception) -> None:
        """End the link: its messages fail, `on_lost` is called once."""
        if self._error is not None:
            return
        self._error = error
        self._owner.dropped(self)
        self.hot = False
        self._owner.loop.unwatch(self._side.fileno())
        self._owner.loop.unwatch(self._worker.epoll_file_descriptor)
        self._side.close()
        unsent = self._release()
        for future in unsent:
            futures.fail(future, error)
        self._outbox.fail_waiting(error)
        self._owner.handler.on_lost(self, error)

    def _release(self) -> list[Future[None]]:
        """Close the endpoint, wait until UCX has let go of every buffer, free the worker; what was not sent."""
        requests = self._inbox.requests + self._outbox.requests
        close_endpoint(self._endpoint, self._worker, requests, (self._tags.envelopes, self._tags.payloads), self.peer)
        self._inbox.clear()
        unsent = self._outbox.clear()
        requests.clear()
        # UCX's worker is freed with the last that holds on to it or to its endpoint.
        del self._endpoint, self._worker
        return unsent

    def _side_ready(self) -> None:
        try:
            data = self._side.recv(1)
        except BlockingIOError:
            return
        except OSError as error:
            reason: Exception = PeerLost(f"{self.peer}: {error}")
        else:
            if data:
                self.drop(MalformedMessage(f"{self.peer} speaks on the socket that only shows that it lives"))
                return
            reason = PeerLost(f"{self.peer} closed the link")
        # What arrived before the end is delivered first.
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while self._error is None and self.poll() and time.monotonic() < deadline:
            pass
        self.drop(reason)
