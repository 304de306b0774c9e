"""One connection of the UCX plane: a UCX worker with one endpoint, and a socket that shows that the peer lives.

On the wire, in tagged messages that UCX keeps in order:
    envelopes   number of entries, then for each: header length, flags, payload length, header, and the payload
                itself where it is small
    payloads    one message for each large payload, in the order of their entries

Each link has a UCX worker of its own, so ending a link releases all of it, whatever state the peer died in.
"""

from __future__ import annotations

import logging
import selectors
import socket
import struct
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from anabranch.errors import (
    DeadlineExceeded,
    FrameTooLarge,
    MalformedMessage,
    PeerLost,
    TransportError,
    TransportUnavailable,
)
from transport.planes import futures
from transport.planes.base import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES
from transport.planes.ucx_api import UcxEndpoint, UcxRequest, UcxWorker, load

if TYPE_CHECKING:
    from transport.planes.ucx import UcxPlane

logger = logging.getLogger(__name__)

# Below UCX's rendezvous threshold, so that an envelope leaves at once.
ENVELOPE_BYTES = 8000
INLINE_BYTES = 3000
NUM_ENVELOPES = 8
# Payloads asked for at a time (one more than so many bytes, so that they are still in the cache when the handler
# looks at them), and entries read ahead.
MAX_POSTED_PAYLOADS = 8
MAX_POSTED_BYTES = 1 << 20
MAX_WAITING = 256
MAX_POSTED_SENDS = 64

STALL_TIMEOUT_S = 10.0
MIN_BYTES_PER_S = 1 << 20
DRAIN_TIMEOUT_S = 1.0

_COUNT = struct.Struct("!H")
_ENTRY = struct.Struct("!HHQ")
_INLINE = 1

Envelope = npt.NDArray[np.uint8]


def _deadline(num_bytes: int) -> float:
    return time.monotonic() + STALL_TIMEOUT_S + num_bytes / MIN_BYTES_PER_S


class _Outgoing:
    __slots__ = ("future", "header", "payload")

    def __init__(self, header: bytes, payload: memoryview | None, future: Future[None]) -> None:
        self.header = header
        self.payload = payload
        self.future = future


class _Posted:
    """A request that UCX works on, and what must stay alive and be told when it is done."""

    __slots__ = ("array", "deadline", "envelope", "futures", "num_bytes", "request")

    def __init__(self, request: UcxRequest, array: object, num_bytes: int, told: list[Future[None]]) -> None:
        self.request = request
        self.array = array
        self.futures = told
        self.envelope: Envelope | None = None
        self.num_bytes = num_bytes
        self.deadline = _deadline(num_bytes)


class _Receiving:
    """A payload that was asked for; `buffer` is None where it is drained."""

    __slots__ = ("buffer", "deadline", "header", "num_bytes", "request")

    def __init__(self, request: UcxRequest, header: bytes, buffer: memoryview | None, num_bytes: int) -> None:
        self.request = request
        self.header = header
        self.buffer = buffer
        self.num_bytes = num_bytes
        self.deadline = _deadline(num_bytes)


class UcxLink:
    """One connection. All but `send` and `close` run on the progress thread.

    Args:
        worker: UCX worker of this link alone.
        peer_address: the UCX address of the other end's worker.
        side: connected socket; its end is the peer's end.

    Attributes:
        hot: the progress thread polls this link in every turn.
        quiet_since: when polling last found something.
    """

    def __init__(self, plane: UcxPlane, worker: UcxWorker, peer_address: bytes, side: socket.socket, peer: str) -> None:
        core = load()
        self.peer = peer
        self.hot = False
        self.quiet_since = 0.0
        self._core = core
        self._plane = plane
        self._worker = worker
        self._side = side
        self._error: Exception | None = None
        try:
            address = core.UCXAddress.create_from_buffer(bytearray(peer_address))
            self._endpoint: UcxEndpoint = core.UCXEndpoint.create_from_worker_address(worker, address, True)
        except core.UCXError as error:
            raise TransportUnavailable(
                f"UCX finds no transport to {peer}: {error}; between hosts set listen_host on both ends, "
                "within a host both ends must see the same shared memory, or use tcp"
            ) from error
        self._envelope_tag, self._payload_tag = core.UCXXTag(1), core.UCXXTag(2)
        self._outgoing: deque[_Outgoing] = deque()
        self._posted: deque[_Posted] = deque()
        self._spare: list[Envelope] = []
        self._envelopes: deque[tuple[UcxRequest, object, Envelope]] = deque()
        self._waiting: deque[tuple[bytes, int, memoryview | None]] = deque()
        self._receiving: deque[_Receiving] = deque()
        self._scratch = core.Array(np.empty(1, np.uint8))

    # From any thread ------------------------------------------------------------------------------------

    def send(self, header: bytes, payload: memoryview | None = None) -> Future[None]:
        num_bytes = payload.nbytes if payload is not None else 0
        if len(header) > MAX_HEADER_BYTES or num_bytes > MAX_PAYLOAD_BYTES:
            return futures.failed(
                FrameTooLarge(f"header {len(header)} of {MAX_HEADER_BYTES}, payload {num_bytes} of {MAX_PAYLOAD_BYTES}")
            )
        future: Future[None] = Future()
        self._outgoing.append(_Outgoing(header, payload, future))
        if self._error is not None:  # after the append: either this or `drop` sees the message
            self._fail_outgoing(self._error)
        elif not self.hot:  # after the append: either this or `rest` sees the message
            self._plane.loop.call_soon(self.heat)
        return future

    def close(self) -> None:
        self._plane.loop.call_soon(lambda: self.drop(PeerLost(f"link to {self.peer} closed at this end")))

    # The link's life --------------------------------------------------------------------------------------

    def start(self) -> None:
        self._plane.loop.watch(self._side.fileno(), selectors.EVENT_READ, self._side_ready)
        self._plane.loop.watch(self._worker.epoll_file_descriptor, selectors.EVENT_READ, self.heat)
        self._fill_envelopes()
        self.heat()

    def heat(self) -> None:
        """Poll this link from now on."""
        if self._error is None and not self.hot:
            self.hot = True
            self.quiet_since = time.monotonic()
            self._plane.hot.append(self)

    def rest(self) -> bool:
        """Stop polling until UCX or a sender calls; False when there is something to do after all."""
        self.hot = False
        try:
            armed = self._worker.arm()
        except self._core.UCXError as error:
            self.drop(PeerLost(f"{self.peer}: {error}"))
            return True
        if not armed or (self._outgoing and len(self._posted) < MAX_POSTED_SENDS):
            self.hot = True
        return not self.hot

    def poll(self) -> bool:
        """Make progress; whether there was any."""
        if self._error is not None:
            return False
        try:
            sent = self._post_outgoing()
            self._worker.progress()
            sent = self._finish_sends() or sent
            return self._receive() or sent
        except TransportError as error:
            self.drop(error)
        except self._core.UCXError as error:
            self.drop(PeerLost(f"{self.peer}: {error}"))
        except Exception as error:
            logger.exception("%s: handler failed; the link is closed", self.peer)
            self.drop(error)
        return False

    def expire(self, now: float) -> float:
        """Drop the link if a message is late; returns the seconds until one is."""
        left = 3600.0
        if self._posted:
            left = min(left, self._posted[0].deadline - now)
        if self._receiving:
            left = min(left, self._receiving[0].deadline - now)
        if left <= 0:
            self.drop(DeadlineExceeded(f"{self.peer} stalled within a message"))
            return 3600.0
        return left

    def drop(self, error: Exception) -> None:
        """End the link: its messages fail, the handler hears of it once."""
        if self._error is not None:
            return
        self._error = error
        if self.hot:
            self.hot = False
            self._plane.hot.remove(self)
        self._plane.links.discard(self)
        self._plane.loop.unwatch(self._side.fileno())
        self._plane.loop.unwatch(self._worker.epoll_file_descriptor)
        self._side.close()
        unsent = [future for posted in self._posted for future in posted.futures]
        self._release()
        for future in unsent:
            futures.fail(future, error)
        self._fail_outgoing(error)
        self._plane.handler.on_lost(self, error)

    def _release(self) -> None:
        """Close the endpoint, wait until UCX has let go of every buffer, and free the worker."""
        # After an error UCX has closed the endpoint itself, and must not be asked again.
        if self._endpoint.alive:
            self._endpoint.close_blocking()
        requests = [receiving.request for receiving in self._receiving]
        requests += [request for request, _, _ in self._envelopes]
        requests += [posted.request for posted in self._posted]
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        # Messages that nobody asked for are taken into one byte each: ucxx would receive them as a whole, into
        # memory of its own, when it frees the worker.
        for tag in (self._envelope_tag, self._payload_tag):
            while self._worker.tag_probe(tag).matched and time.monotonic() < deadline:
                requests.append(self._worker.tag_recv(self._scratch, tag))
        while not all(request.completed for request in requests):
            self._worker.progress()
            if time.monotonic() > deadline:
                logger.error("%s: UCX holds on to %d requests", self.peer, sum(not r.completed for r in requests))
                break
        self._receiving.clear()
        self._envelopes.clear()
        self._waiting.clear()
        self._posted.clear()
        requests.clear()
        del self._endpoint, self._worker

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

    def _fail_outgoing(self, error: Exception) -> None:
        while self._outgoing:
            try:
                futures.fail(self._outgoing.popleft().future, error)
            except IndexError:
                return

    # Sending ------------------------------------------------------------------------------------------------

    def _post_outgoing(self) -> bool:
        if not self._outgoing or len(self._posted) >= MAX_POSTED_SENDS:
            return False
        envelope = self._spare.pop() if self._spare else np.empty(ENVELOPE_BYTES, np.uint8)
        view = envelope.data
        told: list[Future[None]] = []
        payloads: deque[_Outgoing] = deque()
        used, count = _COUNT.size, 0
        # Many small messages leave in one envelope.
        while self._outgoing and len(payloads) < MAX_POSTED_SENDS:
            message = self._outgoing[0]
            header, payload = message.header, message.payload
            num_bytes = payload.nbytes if payload is not None else 0
            inline = 0 < num_bytes <= INLINE_BYTES
            size = _ENTRY.size + len(header) + (num_bytes if inline else 0)
            if used + size > ENVELOPE_BYTES:
                break
            self._outgoing.popleft()
            _ENTRY.pack_into(view, used, len(header), _INLINE if inline else 0, num_bytes)
            used += _ENTRY.size
            view[used : used + len(header)] = header
            used += len(header)
            if inline and payload is not None:
                view[used : used + num_bytes] = payload.cast("B")
                used += num_bytes
            if num_bytes and not inline:
                payloads.append(message)
            else:
                told.append(message.future)
            count += 1
        _COUNT.pack_into(view, 0, count)
        try:
            array = self._core.Array(view[:used])
            posted = _Posted(self._endpoint.tag_send(array, self._envelope_tag), array, used, told)
            posted.envelope = envelope
            self._posted.append(posted)
            told = []
            while payloads:
                payload = payloads[0].payload
                assert payload is not None
                array = self._core.Array(payload)
                request = self._endpoint.tag_send(array, self._payload_tag)
                self._posted.append(_Posted(request, array, payload.nbytes, [payloads.popleft().future]))
        except self._core.UCXError as error:
            lost = PeerLost(f"{self.peer}: {error}")
            for future in [*told, *(message.future for message in payloads)]:
                futures.fail(future, lost)
            raise lost from error
        return True

    def _finish_sends(self) -> bool:
        posted = self._posted
        finished = False
        while posted and posted[0].request.completed:
            done = posted[0]
            done.request.check_error()  # raises: the link is dropped, with this and all later messages
            posted.popleft()
            finished = True
            if done.envelope is not None:
                self._spare.append(done.envelope)
            for future in done.futures:
                futures.succeed(future)
        if finished and posted:  # its time begins when it is the first in the queue
            posted[0].deadline = _deadline(posted[0].num_bytes)
        return finished

    # Receiving ----------------------------------------------------------------------------------------------

    def _fill_envelopes(self) -> None:
        for _ in range(NUM_ENVELOPES):
            self._ask_envelope(np.empty(ENVELOPE_BYTES, np.uint8))

    def _ask_envelope(self, envelope: Envelope) -> None:
        array = self._core.Array(envelope)
        self._envelopes.append((self._endpoint.tag_recv(array, self._envelope_tag), array, envelope))

    def _receive(self) -> bool:
        received = False
        while True:
            step = self._read_envelopes()
            step = self._announce() or step
            step = self._finish_receives() or step
            if not step or self._error is not None:
                return received
            received = True

    def _read_envelopes(self) -> bool:
        read = False
        while self._envelopes and self._envelopes[0][0].completed and len(self._waiting) < MAX_WAITING:
            request, _, envelope = self._envelopes.popleft()
            request.check_error()
            self._parse(envelope.data)
            self._ask_envelope(envelope)
            read = True
        return read

    def _parse(self, view: memoryview) -> None:
        (count,) = _COUNT.unpack_from(view)
        at = _COUNT.size
        for _ in range(count):
            if at + _ENTRY.size > ENVELOPE_BYTES:
                raise MalformedMessage(f"{self.peer}: envelope of {count} entries is too long")
            header_bytes, flags, payload_bytes = _ENTRY.unpack_from(view, at)
            at += _ENTRY.size
            if header_bytes > MAX_HEADER_BYTES:
                raise FrameTooLarge(f"{self.peer}: header of {header_bytes} bytes, at most {MAX_HEADER_BYTES}")
            if payload_bytes > MAX_PAYLOAD_BYTES:
                raise FrameTooLarge(f"{self.peer}: payload of {payload_bytes} bytes, at most {MAX_PAYLOAD_BYTES}")
            inline_bytes = payload_bytes if flags == _INLINE else 0
            if flags not in (0, _INLINE) or at + header_bytes + inline_bytes > ENVELOPE_BYTES:
                raise MalformedMessage(f"{self.peer}: not an envelope of this plane")
            header = bytes(view[at : at + header_bytes])
            at += header_bytes
            inline = memoryview(bytes(view[at : at + inline_bytes])) if inline_bytes else None
            at += inline_bytes
            self._waiting.append((header, payload_bytes, inline))

    def _announce(self) -> bool:
        """Ask the handler where the next payloads go. A message without one waits for its turn."""
        announced = False
        while self._waiting and len(self._receiving) < MAX_POSTED_PAYLOADS and self._error is None:
            if sum(receiving.num_bytes for receiving in self._receiving) > MAX_POSTED_BYTES:
                break
            header, payload_bytes, inline = self._waiting[0]
            whole = inline is not None or not payload_bytes
            if whole and self._receiving:
                break
            self._waiting.popleft()
            buffer = self._plane.handler.on_header(self, header, payload_bytes)
            announced = True
            if not payload_bytes:
                continue
            if buffer is not None and buffer.nbytes != payload_bytes:
                raise MalformedMessage(f"handler gave {buffer.nbytes} bytes for a payload of {payload_bytes}")
            if inline is not None:
                if buffer is not None:
                    buffer.cast("B")[:] = inline
                    self._plane.handler.on_payload(self, header, buffer)
                continue
            # A payload that is not wanted is received into one byte: UCX drops the rest without moving it.
            array = self._core.Array(buffer) if buffer is not None else self._scratch
            request = self._endpoint.tag_recv(array, self._payload_tag)
            self._receiving.append(_Receiving(request, header, buffer, payload_bytes))
        return announced

    def _finish_receives(self) -> bool:
        finished = False
        while self._receiving and self._receiving[0].request.completed and self._error is None:
            done = self._receiving.popleft()
            finished = True
            if done.buffer is None:
                continue
            done.request.check_error()
            self._plane.handler.on_payload(self, done.header, done.buffer)
        if finished and self._receiving:
            self._receiving[0].deadline = _deadline(self._receiving[0].num_bytes)
        return finished
