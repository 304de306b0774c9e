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
from orchestrator.limits import check_chars, check_entries
from orchestrator.wire import BYTES, wire_fields

_M = TypeVar("_M", bound=Message)


def parser(
    kind: type[_M], check_num_ids: Callable[[int], None] = lambda num_ids: None
) -> Callable[[bytes], _M | InvalidRequest]:
    """A gRPC deserializer for `kind` that gives an InvalidRequest instead of raising.

    Args:
        check_num_ids: raises InvalidRequest for more prompt ids than can be served.
    """

    def parse(data: bytes) -> _M | InvalidRequest:
        message = kind()
        descriptor = cast(Descriptor, message.DESCRIPTOR)
        try:
            check_entries(descriptor, data, check_num_ids)
            message.ParseFromString(data)
            check_chars(message)
            return message
        except InvalidRequest as error:
            # The traceback would keep the message alive for as long as the error.
            return error.with_traceback(None)
        except DecodeError as error:
            field = bad_string(descriptor, memoryview(data))
            if field is not None:
                return InvalidRequest("is not valid UTF-8", field)
            return InvalidRequest(f"the message cannot be parsed: {error}")
        except ValueError as error:
            return InvalidRequest(f"the message cannot be parsed: {error}")

    return parse


def bad_string(descriptor: Descriptor, data: memoryview) -> str | None:
    """Path of the first string field that is not UTF-8, or None."""
    try:
        for number, wire_type, value in wire_fields(data):
            field = descriptor.fields_by_number.get(number)
            path = _bad_in(field, value) if field is not None and wire_type == BYTES else None
            if path is not None:
                return path
    except ValueError:
        pass
    return None


def _bad_in(field: FieldDescriptor, value: memoryview) -> str | None:
    if field.type == FieldDescriptor.TYPE_STRING:
        try:
            str(value, "utf-8")
        except UnicodeDecodeError:
            return field.name
    elif field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
        inner = bad_string(field.message_type, value)
        return None if inner is None else f"{field.name}.{inner}"
    return None
