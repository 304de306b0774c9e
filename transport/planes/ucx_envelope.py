"""How the UCX plane packs messages: one envelope for many headers and small payloads.

number of entries (u16), then for each: header length (u16), flags (u16), payload length (u64), the header, and
the payload itself where it is small. Large payloads follow as messages of their own, in the order of their entries.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from anabranch.errors import FrameTooLarge, MalformedMessage
from transport.planes.base import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES

# Below UCX's rendezvous threshold, so that an envelope leaves at once.
ENVELOPE_BYTES = 8000
INLINE_BYTES = 3000

_COUNT = struct.Struct("!H")
_ENTRY = struct.Struct("!HHQ")
_INLINE = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One message of an envelope.

    Attributes:
        payload_bytes: length of the payload; 0: none.
        inline: the payload, where the envelope holds it.
    """

    header: bytes
    payload_bytes: int
    inline: memoryview | None

    @property
    def is_whole(self) -> bool:
        """Whether no payload follows."""
        return self.inline is not None or not self.payload_bytes


class EnvelopeWriter:
    """Fills a buffer of ENVELOPE_BYTES."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._count = 0
        self.num_bytes = _COUNT.size

    def add(self, header: bytes, payload: memoryview | None) -> bool | None:
        """Add a message; whether its payload is to follow on its own, or None where the envelope is full."""
        payload_bytes = payload.nbytes if payload is not None else 0
        inline = payload_bytes <= INLINE_BYTES
        start = self.num_bytes + _ENTRY.size
        middle = start + len(header)
        end = middle + (payload_bytes if inline else 0)
        if end > ENVELOPE_BYTES:
            return None
        view = self._view
        flags = _INLINE if inline and payload_bytes else 0
        _ENTRY.pack_into(view, self.num_bytes, len(header), flags, payload_bytes)
        view[start:middle] = header
        if inline and payload is not None:
            view[middle:end] = payload.cast("B")
        self.num_bytes = end
        self._count += 1
        return not inline

    def finish(self) -> memoryview:
        """What is to be sent."""
        _COUNT.pack_into(self._view, 0, self._count)
        return self._view[: self.num_bytes]


def parse_envelope(view: memoryview, peer: str) -> list[Entry]:
    """The messages of an envelope from `peer`.

    Raises:
        MalformedMessage: this is no envelope.
        FrameTooLarge: a header or payload is longer than a plane carries.
    """
    (count,) = _COUNT.unpack_from(view)
    at = _COUNT.size
    entries = []
    for _ in range(count):
        if at + _ENTRY.size > ENVELOPE_BYTES:
            raise MalformedMessage(f"{peer}: envelope of {count} entries is too long")
        header_bytes, flags, payload_bytes = _ENTRY.unpack_from(view, at)
        at += _ENTRY.size
        if header_bytes > MAX_HEADER_BYTES:
            raise FrameTooLarge(f"{peer}: header of {header_bytes} bytes, at most {MAX_HEADER_BYTES}")
        if payload_bytes > MAX_PAYLOAD_BYTES:
            raise FrameTooLarge(f"{peer}: payload of {payload_bytes} bytes, at most {MAX_PAYLOAD_BYTES}")
        inline_bytes = payload_bytes if flags == _INLINE else 0
        if flags not in (0, _INLINE) or at + header_bytes + inline_bytes > ENVELOPE_BYTES:
            raise MalformedMessage(f"{peer}: not an envelope of this plane")
        header = bytes(view[at : at + header_bytes])
        at += header_bytes
        inline = memoryview(bytes(view[at : at + inline_bytes])) if inline_bytes else None
        at += inline_bytes
        entries.append(Entry(header, payload_bytes, inline))
    return entries
