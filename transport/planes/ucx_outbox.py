"""What one UCX link sends: messages wait, are posted to UCX many at a time, and their futures are told."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from types import ModuleType

import numpy as np

from anabranch.errors import PeerLost
from transport.planes import futures
from transport.planes.base import too_large
from transport.planes.stall import message_deadline
from transport.planes.ucx_envelope import ENVELOPE_BYTES, EnvelopeWriter
from transport.ucx.api import Bytes, UcxEndpoint, UcxRequest, UcxTags

MAX_POSTED = 64


class _Waiting:
    __slots__ = ("future", "header", "payload")

    def __init__(self, header: bytes, payload: memoryview | None, future: Future[None]) -> None:
        self.header = header
        self.payload = payload
        self.future = future


class _Posted:
    """A request that UCX works on, and what must stay alive and be told when it is done."""

    __slots__ = ("array", "deadline", "envelope", "futures", "num_bytes", "request")

    def __init__(
        self, request: UcxRequest, array: object, num_bytes: int, told: list[Future[None]], envelope: Bytes | None
    ) -> None:
        self.request = request
        self.array = array
        self.futures = told
        self.envelope = envelope
        self.num_bytes = num_bytes
        self.deadline = message_deadline(num_bytes)


class UcxOutbox:
    """`put` may be called from any thread, all else on the progress thread.

    Args:
        core: ucxx's core module.
        peer: the other end's name, for errors.
    """

    def __init__(self, core: ModuleType, endpoint: UcxEndpoint, tags: UcxTags, peer: str) -> None:
        self._core = core
        self._endpoint = endpoint
        self._tags = tags
        self._peer = peer
        self._waiting: deque[_Waiting] = deque()
        self._posted: deque[_Posted] = deque()
        self._spare: list[Bytes] = []

    def __len__(self) -> int:
        """Messages that are not posted."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether `post` would post something."""
        return bool(self._waiting) and len(self._posted) < MAX_POSTED

    @property
    def deadline(self) -> float | None:
        """When the oldest posted message is late."""
        return self._posted[0].deadline if self._posted else None

    @property
    def requests(self) -> list[UcxRequest]:
        """What UCX works on."""
        return [posted.request for posted in self._posted]

    def put(self, header: bytes, payload: memoryview | None) -> Future[None]:
        """Queue a message; see `Link.send`."""
        refusal = too_large(header, payload)
        if refusal is not None:
            return futures.failed(refusal)
        future: Future[None] = Future()
        self._waiting.append(_Waiting(header, payload, future))
        return future

    def fail_waiting(self, error: Exception) -> None:
        """Fail what was not posted; from any thread, several at once."""
        while self._waiting:
            try:
                futures.fail(self._waiting.popleft().future, error)
            except IndexError:
                return

    def clear(self) -> list[Future[None]]:
        """Let go of the endpoint and of what was posted; the futures that nobody has told."""
        untold = [future for posted in self._posted for future in posted.futures]
        self._posted.clear()
        del self._endpoint
        return untold

    def post(self) -> bool:
        """Give UCX an envelope of what waits, and its payloads; whether there was anything."""
        if not self.has_work:
            return False
        envelope = self._spare.pop() if self._spare else np.empty(ENVELOPE_BYTES, np.uint8)
        writer = EnvelopeWriter(envelope.data)
        told: list[Future[None]] = []
        payloads: deque[_Waiting] = deque()
        while self._waiting and len(payloads) < MAX_POSTED:
            message = self._waiting[0]
            follows = writer.add(message.header, message.payload)
            if follows is None:
                break
            self._waiting.popleft()
            if follows:
                payloads.append(message)
            else:
                told.append(message.future)
        try:
            array = self._core.Array(writer.finish())
            request = self._endpoint.tag_send(array, self._tags.envelopes)
            self._posted.append(_Posted(request, array, writer.num_bytes, told, envelope))
            told = []
            while payloads:
                payload = payloads[0].payload
                assert payload is not None
                array = self._core.Array(payload)
                request = self._endpoint.tag_send(array, self._tags.payloads)
                self._posted.append(_Posted(request, array, payload.nbytes, [payloads.popleft().future], None))
        except self._core.UCXError as error:
            lost = PeerLost(f"{self._peer}: {error}")
            for future in [*told, *(message.future for message in payloads)]:
                futures.fail(future, lost)
            raise lost from error
        return True

    def finish(self) -> bool:
        """Tell the futures of what has been sent; whether there was anything."""
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
            posted[0].deadline = message_deadline(posted[0].num_bytes)
        return finished
