"""What one UCX link receives: envelopes are always asked for, payloads once the handler has said where they go."""

from __future__ import annotations

from collections import deque
from types import ModuleType
from typing import Protocol

import numpy as np

from anabranch.errors import MalformedMessage
from transport.planes.stall import message_deadline
from transport.planes.ucx_envelope import ENVELOPE_BYTES, Entry, parse_envelope
from transport.ucx.api import Bytes, UcxEndpoint, UcxRequest, UcxTags

NUM_ENVELOPES = 8
# Payloads asked for at a time (one more than so many bytes, so that they are still in the cache when the handler
# looks at them), and entries read ahead.
MAX_POSTED_PAYLOADS = 8
MAX_POSTED_BYTES = 1 << 20
MAX_WAITING = 256


class Receiver(Protocol):
    """Whom messages are for; see `PlaneHandler`. Once `ended`, nothing more is brought."""

    @property
    def ended(self) -> bool: ...

    def on_header(self, header: bytes, payload_bytes: int) -> memoryview | None: ...

    def on_payload(self, header: bytes, buffer: memoryview) -> None: ...


class _Payload:
    """A payload that was asked for; `buffer` is None where it is drained."""

    __slots__ = ("buffer", "deadline", "header", "num_bytes", "request")

    def __init__(self, request: UcxRequest, header: bytes, buffer: memoryview | None, num_bytes: int) -> None:
        self.request = request
        self.header = header
        self.buffer = buffer
        self.num_bytes = num_bytes
        self.deadline = message_deadline(num_bytes)


class UcxInbox:
    """All on the progress thread.

    Args:
        core: ucxx's core module.
        peer: the other end's name, for errors.
    """

    def __init__(self, core: ModuleType, endpoint: UcxEndpoint, tags: UcxTags, peer: str, receiver: Receiver) -> None:
        self._core = core
        self._endpoint = endpoint
        self._tags = tags
        self._peer = peer
        self._receiver = receiver
        self._envelopes: deque[tuple[UcxRequest, object, Bytes]] = deque()
        self._waiting: deque[Entry] = deque()
        self._payloads: deque[_Payload] = deque()
        self._scratch = core.Array(np.empty(1, np.uint8))

    @property
    def deadline(self) -> float | None:
        """When the oldest payload is late."""
        return self._payloads[0].deadline if self._payloads else None

    @property
    def requests(self) -> list[UcxRequest]:
        """What UCX works on."""
        return [payload.request for payload in self._payloads] + [request for request, _, _ in self._envelopes]

    def clear(self) -> None:
        """Let go of the endpoint and of what was asked for."""
        self._payloads.clear()
        self._envelopes.clear()
        self._waiting.clear()
        del self._endpoint

    def start(self) -> None:
        """Ask for the first envelopes."""
        for _ in range(NUM_ENVELOPES):
            self._ask_envelope(np.empty(ENVELOPE_BYTES, np.uint8))

    def receive(self) -> bool:
        """Hand over what has come; whether there was anything."""
        received = False
        while True:
            step = self._read_envelopes()
            step = self._announce() or step
            step = self._finish() or step
            if not step or self._receiver.ended:
                return received
            received = True

    def _ask_envelope(self, envelope: Bytes) -> None:
        array = self._core.Array(envelope)
        self._envelopes.append((self._endpoint.tag_recv(array, self._tags.envelopes), array, envelope))

    def _read_envelopes(self) -> bool:
        read = False
        while self._envelopes and self._envelopes[0][0].completed and len(self._waiting) < MAX_WAITING:
            request, _, envelope = self._envelopes.popleft()
            request.check_error()
            self._waiting.extend(parse_envelope(envelope.data, self._peer))
            self._ask_envelope(envelope)
            read = True
        return read

    def _announce(self) -> bool:
        """Ask the receiver where the next payloads go. A message without one waits for its turn."""
        announced = False
        while self._waiting and len(self._payloads) < MAX_POSTED_PAYLOADS and not self._receiver.ended:
            if sum(payload.num_bytes for payload in self._payloads) > MAX_POSTED_BYTES:
                break
            entry = self._waiting[0]
            if entry.is_whole and self._payloads:
                break
            self._waiting.popleft()
            header, payload_bytes = entry.header, entry.payload_bytes
            buffer = self._receiver.on_header(header, payload_bytes)
            announced = True
            if not payload_bytes:
                continue
            if buffer is not None and buffer.nbytes != payload_bytes:
                raise MalformedMessage(f"handler gave {buffer.nbytes} bytes for a payload of {payload_bytes}")
            if entry.inline is not None:
                if buffer is not None:
                    buffer.cast("B")[:] = entry.inline
                    self._receiver.on_payload(header, buffer)
                continue
            # A payload that is not wanted is received into one byte: UCX drops the rest without moving it.
            array = self._core.Array(buffer) if buffer is not None else self._scratch
            request = self._endpoint.tag_recv(array, self._tags.payloads)
            self._payloads.append(_Payload(request, header, buffer, payload_bytes))
        return announced

    def _finish(self) -> bool:
        finished = False
        while self._payloads and self._payloads[0].request.completed and not self._receiver.ended:
            done = self._payloads.popleft()
            finished = True
            if done.buffer is None:
                continue
            done.request.check_error()
            self._receiver.on_payload(done.header, done.buffer)
        if finished and self._payloads:
            self._payloads[0].deadline = message_deadline(self._payloads[0].num_bytes)
        return finished
