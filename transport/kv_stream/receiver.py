"""Receives KV streams for one rank: checks every slice, places it, commits when all of it is there.

A slice's way: header checked (stream, generation, range, size) -> payload into a staging buffer -> checksum,
coverage -> sink. Whatever does not pass is drained, the stream fails, and its senders are told with an Ack.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque

from anabranch.errors import (
    AnabranchError,
    CapacityError,
    FrameTooLarge,
    MalformedMessage,
    PeerLost,
    RequestCancelled,
    StaleLease,
)
from anabranch.parallel.layout import KvLayout
from anabranch.protocol.wire_error import WireError
from transport.kv_stream.incoming import IncomingStream
from transport.kv_stream.messages import Abort, Ack, Commit, Slice, decode_to_receiver, encode
from transport.kv_stream.sink import KvSink
from transport.kv_stream.staging import Staging, StagingPool
from transport.planes.base import Link

logger = logging.getLogger(__name__)

MAX_SLICE_BYTES = 64 << 20
# Streams for which a link has been told that they are unknown here, so that it is told once.
MAX_REFUSALS = 1024


class _Arrival:
    """A payload that is on its way into a staging buffer."""

    __slots__ = ("payload_bytes", "slice", "staging", "stream")

    def __init__(self, stream: IncomingStream, slice_: Slice, staging: Staging, payload_bytes: int) -> None:
        self.stream = stream
        self.slice = slice_
        self.staging = staging
        self.payload_bytes = payload_bytes


class KvStreamReceiver:
    """The handler of a decode rank's planes. `open` and `close` may be called from any thread.

    Args:
        max_staging_bytes: most bytes of slices that have arrived or are arriving and are not placed yet.
    """

    def __init__(self, *, max_staging_bytes: int = 256 << 20) -> None:
        self._lock = threading.Lock()
        self._streams: dict[int, IncomingStream] = {}
        self._arrivals: dict[Link, deque[_Arrival]] = {}
        self._refused: dict[Link, OrderedDict[tuple[int, int], None]] = {}
        self._pool = StagingPool(max_staging_bytes)

    @property
    def num_streams(self) -> int:
        """Streams that are open."""
        return len(self._streams)

    @property
    def staging_bytes(self) -> int:
        """Bytes of staging buffers in use."""
        return self._pool.used_bytes

    def open(
        self,
        stream_id: int,
        generation: int,
        *,
        layout: KvLayout,
        rank: int,
        num_cached_tokens: int,
        num_tokens: int,
        sink: KvSink,
    ) -> None:
        """Expect a stream: tokens `num_cached_tokens` to `num_tokens - 1` of the heads that `rank` holds."""
        stream = IncomingStream(
            stream_id=stream_id,
            generation=generation,
            layout=layout,
            rank=rank,
            num_cached_tokens=num_cached_tokens,
            num_tokens=num_tokens,
            sink=sink,
        )
        with self._lock:
            assert stream_id not in self._streams, f"KV stream {stream_id} is open already"
            self._streams[stream_id] = stream

    def close(self, stream_id: int) -> None:
        """Forget a stream; later slices of it are refused. Idempotent. When this returns, `place` is over."""
        with self._lock:
            stream = self._streams.pop(stream_id, None)
        if stream is None:
            return
        with stream.lock:
            if not stream.ended:
                stream.ended = True
                self._acknowledge(stream, RequestCancelled("the receiver closed the stream"))

    # What a plane calls, on its progress thread --------------------------------------------------------

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None:
        message = decode_to_receiver(header)
        if isinstance(message, Slice):
            return self._begin(link, message, payload_bytes)
        if payload_bytes:
            raise MalformedMessage(f"{type(message).__name__} with a payload of {payload_bytes} bytes")
        stream = self._find(message.stream_id, message.generation)
        if isinstance(message, Commit):
            self._commit(link, message, stream)
        elif stream is not None:
            self._abort(message, stream)
        return None

    def on_payload(self, link: Link, header: bytes, buffer: memoryview) -> None:
        arrival = self._arrivals[link].popleft()
        stream = arrival.stream
        try:
            with stream.lock:
                if stream.ended:
                    return
                try:
                    stream.place(arrival.slice, arrival.staging, arrival.payload_bytes)
                    stream.sink.touch()
                except Exception as error:
                    self._fail(stream, error)
        finally:
            self._pool.give(arrival.staging)

    def on_lost(self, link: Link, error: Exception) -> None:
        self._refused.pop(link, None)
        for arrival in self._arrivals.pop(link, ()):
            self._pool.give(arrival.staging)
        with self._lock:
            streams = list(self._streams.values())
        for stream in streams:
            with stream.lock:
                if not stream.ended and any(source.link is link for source in stream.sources.values()):
                    self._fail(stream, PeerLost(f"the sender of the KV stream is gone: {error}"))

    # The messages --------------------------------------------------------------------------------------

    def _find(self, stream_id: int, generation: int) -> IncomingStream | None:
        with self._lock:
            stream = self._streams.get(stream_id)
        return stream if stream is not None and stream.generation == generation else None

    def _begin(self, link: Link, slice_: Slice, payload_bytes: int) -> memoryview | None:
        stream = self._find(slice_.stream_id, slice_.generation)
        if stream is None:
            self._refuse(link, slice_.stream_id, slice_.generation)
            return None
        with stream.lock:
            if stream.ended:
                self._tell(stream, link, stream.error or StaleLease(f"KV stream {stream.stream_id} has ended"))
                return None
            try:
                if payload_bytes > MAX_SLICE_BYTES:
                    raise FrameTooLarge(f"slice of {payload_bytes} bytes, at most {MAX_SLICE_BYTES}")
                stream.expect(slice_, payload_bytes, link)
                staging = self._pool.take(payload_bytes)
                if staging is None:
                    raise CapacityError(f"all {self._pool.max_bytes} bytes of staging for KV slices are in use")
            except AnabranchError as error:
                self._fail(stream, error, link)
                return None
            stream.sink.touch()
        arrivals = self._arrivals.setdefault(link, deque())
        arrivals.append(_Arrival(stream, slice_, staging, payload_bytes))
        return staging.view[:payload_bytes]

    def _commit(self, link: Link, commit: Commit, stream: IncomingStream | None) -> None:
        if stream is None:
            self._refuse(link, commit.stream_id, commit.generation)
            return
        with stream.lock:
            if stream.ended:
                self._tell(stream, link, stream.error or StaleLease(f"KV stream {stream.stream_id} has ended"))
                return
            try:
                stream.sink.touch()
                if stream.commit(commit, link):
                    stream.ended = True
                    stream.sink.committed(commit)
                    self._acknowledge(stream, None)
            except Exception as error:
                self._fail(stream, error, link)

    def _abort(self, abort: Abort, stream: IncomingStream) -> None:
        with stream.lock:
            if not stream.ended:
                self._fail(stream, abort.error.to_error())

    def _fail(self, stream: IncomingStream, error: Exception, link: Link | None = None) -> None:
        """End a stream (its lock is held): tell the senders and the sink.

        `link`: where the offence came from, told even if it belongs to none of the stream's sources.
        """
        if not isinstance(error, AnabranchError):
            logger.exception("KV stream %d: the sink failed", stream.stream_id, exc_info=error)
            named = AnabranchError(f"placing KV failed: {error}")
            named.__cause__ = error
            error = named
        stream.ended = True
        stream.error = error
        self._acknowledge(stream, error)
        if link is not None:
            self._tell(stream, link, error)
        try:
            stream.sink.failed(error)
        except Exception:
            logger.exception("KV stream %d: sink.failed failed", stream.stream_id)

    # Answers -------------------------------------------------------------------------------------------

    def _acknowledge(self, stream: IncomingStream, error: AnabranchError | None) -> None:
        for source in stream.sources.values():
            self._tell(stream, source.link, error)

    def _tell(self, stream: IncomingStream, link: Link, error: AnabranchError | None) -> None:
        """Tell the other end of a link how the stream ended, once."""
        if link not in stream.told:
            stream.told.add(link)
            self._send_ack(link, stream.stream_id, stream.generation, error)

    def _refuse(self, link: Link, stream_id: int, generation: int) -> None:
        refused = self._refused.setdefault(link, OrderedDict())
        if (stream_id, generation) in refused:
            return
        refused[stream_id, generation] = None
        if len(refused) > MAX_REFUSALS:
            refused.popitem(last=False)
        error = StaleLease(f"KV stream {stream_id}, generation {generation}, is not open here")
        self._send_ack(link, stream_id, generation, error)

    def _send_ack(self, link: Link, stream_id: int, generation: int, error: AnabranchError | None) -> None:
        wire = None if error is None else WireError.of(error)
        link.send(encode(Ack(stream_id=stream_id, generation=generation, error=wire)))
