"""Bytes to protobuf messages, without gRPC's own answer to what cannot be parsed.

gRPC answers INTERNAL to a message that its deserializer refuses. Here the refusal becomes a value that the
handler answers with INVALID_ARGUMENT and, where a string is not UTF-8 or a field holds too much, the field's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from anabranch.errors import InvalidRequest
from orchestrator.limits import check_limits

_M = TypeVar("_M", bound=Message)

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def parser(kind: type[_M]) -> Callable[[bytes], _M | InvalidRequest]:
    """A gRPC deserializer for `kind` that gives an InvalidRequest instead of raising."""

    def parse(data: bytes) -> _M | InvalidRequest:
        message = kind()
        try:
            message.ParseFromString(data)
            check_limits(message)
            return message
        except InvalidRequest as error:
            return error
        except DecodeError as error:
            try:
                field = bad_string(cast(Descriptor, message.DESCRIPTOR), data)
            except (IndexError, ValueError):
                field = None
            if field is not None:
                return InvalidRequest("is not valid UTF-8", field)
            return InvalidRequest(f"the message cannot be parsed: {error}")

    return parse


def bad_string(descriptor: Descriptor, data: bytes) -> str | None:
    """Path of the first string field that is not UTF-8, or None. Raises IndexError or ValueError on cut bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire_type = tag & 7
        if wire_type == _VARINT:
            _, at = _varint(data, at)
        elif wire_type == _FIXED64:
            at += 8
        elif wire_type == _FIXED32:
            at += 4
        elif wire_type == _BYTES:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
            field = descriptor.fields_by_number.get(tag >> 3)
            path = _bad_in(field, value) if field is not None else None
            if path is not None:
                return path
        else:
            raise ValueError(f"wire type {wire_type}")
    return None


def _bad_in(field: FieldDescriptor, value: bytes) -> str | None:
    if field.type == FieldDescriptor.TYPE_STRING:
        try:
            value.decode("utf-8")
        except UnicodeDecodeError:
            return field.name
    elif field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
        inner = bad_string(field.message_type, value)
        return None if inner is None else f"{field.name}.{inner}"
    return None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint longer than 10 bytes")
