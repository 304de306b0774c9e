"""Protobuf's wire format, as far as it takes to look at a message before it is parsed."""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

_GO_ON = bytes(range(0x80, 0x100))


def wire_fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Number, wire type and value of each field; the value is empty where the type is not BYTES.

    Raises:
        ValueError: the bytes are cut short, or no message of today.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        value = data[:0]
        if wire_type == VARINT:
            _, at = _varint(data, at)
        elif wire_type == FIXED64:
            at += 8
        elif wire_type == FIXED32:
            at += 4
        elif wire_type == BYTES:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        else:
            raise ValueError(f"wire type {wire_type}")
        if at > len(data):
            raise ValueError("cut short")
        yield number, wire_type, value


def num_varints(packed: memoryview) -> int:
    """How many integers a packed field holds; each one's last byte alone is below 0x80."""
    return len(bytes(packed).translate(None, _GO_ON))


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint longer than 10 bytes")
    raise ValueError("cut short")
