"""The header of a call and of an answer: fixed size, versioned, checked against the channel's shape.

`open_header` looks at what frames a message: without that nothing after it can be understood, and the link must end.
`check_call` and `check_answer` look at every other field, before any tensor is made.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import torch
import xxhash

from anabranch.errors import ChecksumMismatch, MalformedMessage
from transport.m2n.base import ChannelShape
from transport.m2n.messages import Answer, Call, Combine, Status

MAGIC = b"ANBM"
WIRE_VERSION = 1
ALIGNMENT = 8

_HEADER = struct.Struct("<4sHBBBBHIII4Q6I2Q24x")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size
MAX_NUMBER = (1 << 32) - 1

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
COMBINES = tuple(Combine)
STATUSES = tuple(Status)
# A member's look-up in its enumeration costs more than a comparison.
_ROWS, _SLOTS, _SUMS = COMBINES
_OK = Status.OK


class Kind(IntEnum):
    CALL = 1
    ANSWER = 2


_CALL, _ANSWER = Kind


class Header(NamedTuple):
    """The fields of a call or an answer. An answer repeats what its call says of itself: ticket, step, layer and so on.

    Attributes:
        dtype: index in `DTYPES`, of the rows.
        num_rows: of this message.
        num_assignments: of the call.
        incarnation: the sender's, as it said when the link began.
        body_bytes: what follows.
        body_checksum: xxh3-64 of the body; 0: not computed.
    """

    magic: bytes
    version: int
    kind: int
    dtype: int
    combine: int
    status: int
    lane: int
    layer: int
    attempt: int
    num_rows: int
    ticket: int
    step: int
    placement: int
    incarnation: int
    num_assignments: int
    hidden_size: int
    queue_us: int
    compute_us: int
    merged_rows: int
    reserved: int
    body_bytes: int
    body_checksum: int


# What an answer repeats, and what follows from its call.
_FIRST, _END = Header._fields.index("dtype"), Header._fields.index("hidden_size") + 1
# Like `Header._make`, whose fields are as many by the format.
_make_header: Callable[[type[Header], tuple[object, ...]], Header] = tuple.__new__


def aligned(num_bytes: int) -> int:
    """The length that a part of a body takes: the next begins at a multiple of ALIGNMENT."""
    return (num_bytes + ALIGNMENT - 1) & -ALIGNMENT


def call_body_bytes(shape: ChannelShape, combine: int, num_rows: int, num_assignments: int) -> int:
    """Rows, then experts and rows of the assignments, then weights."""
    rows = aligned(num_rows * shape.hidden_size * shape.dtype.itemsize)
    if not num_assignments:
        return rows
    return rows + (3 if combine == _SUMS else 2) * aligned(4 * num_assignments)


def answer_dtype(shape: ChannelShape, combine: int) -> torch.dtype:
    return torch.float32 if combine == _SUMS else shape.dtype


def answer_body_bytes(shape: ChannelShape, combine: int, num_rows: int) -> int:
    return aligned(num_rows * shape.hidden_size * answer_dtype(shape, combine).itemsize)


def max_call_bytes(shape: ChannelShape) -> int:
    """The longest call, its header included."""
    return HEADER_BYTES + call_body_bytes(shape, Combine.SUMS, shape.max_rows, shape.max_rows * shape.max_choices)


def max_answer_bytes(shape: ChannelShape) -> int:
    """The longest answer, its header included."""
    slots = answer_body_bytes(shape, Combine.SLOTS, shape.max_rows * shape.max_choices)
    return HEADER_BYTES + max(slots, answer_body_bytes(shape, Combine.SUMS, shape.max_rows))


def pack_call(call: Call, shape: ChannelShape, incarnation: int, body_checksum: int) -> bytes:
    """The header of a call whose sizes fit the shape."""
    num_rows, num_assignments = call.rows_TC.shape[0], call.rows_A.shape[0]
    return _seal(
        _HEADER.pack(
            MAGIC,
            WIRE_VERSION,
            _CALL,
            DTYPE_CODES[shape.dtype],
            call.combine,
            _OK,
            call.lane,
            call.layer,
            call.attempt,
            num_rows,
            call.ticket,
            call.step,
            call.placement,
            incarnation,
            num_assignments,
            shape.hidden_size,
            0,
            0,
            0,
            0,
            call_body_bytes(shape, call.combine, num_rows, num_assignments),
            body_checksum,
        )
    )


def pack_answer(answer: Answer, call: Header, shape: ChannelShape, incarnation: int, body_checksum: int) -> bytes:
    """The header of an answer to the call of header `call`."""
    num_rows = answer.rows_RC.shape[0]
    return _seal(
        _HEADER.pack(
            MAGIC,
            WIRE_VERSION,
            _ANSWER,
            DTYPE_CODES[answer_dtype(shape, call.combine)],
            call.combine,
            answer.status,
            call.lane,
            call.layer,
            answer.attempt,
            num_rows,
            answer.ticket,
            call.step,
            call.placement,
            incarnation,
            call.num_assignments,
            shape.hidden_size,
            min(answer.queue_us, MAX_NUMBER),
            min(answer.compute_us, MAX_NUMBER),
            min(answer.merged_rows, MAX_NUMBER),
            0,
            answer_body_bytes(shape, call.combine, num_rows),
            body_checksum,
        )
    )


def _seal(fields: bytes) -> bytes:
    return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))


def open_header(data: bytes, kind: Kind, incarnation: int, max_body_bytes: int) -> Header:
    """The fields of HEADER_BYTES bytes, of which only those that frame the message have been looked at.

    Raises:
        MalformedMessage, ChecksumMismatch: nothing after it on this link can be understood.
    """
    fields = data[: _HEADER.size]
    header = _make_header(Header, _HEADER.unpack(fields))
    if header.magic != MAGIC:
        raise MalformedMessage(f"magic: {header.magic!r}, not {MAGIC!r}")
    if header.version != WIRE_VERSION:
        raise MalformedMessage(f"version: {header.version}, this end speaks {WIRE_VERSION}")
    if _CHECKSUM.unpack_from(data, _HEADER.size)[0] != xxhash.xxh3_64_intdigest(fields):
        raise ChecksumMismatch("header_checksum: the header is damaged")
    if header.kind != kind:
        raise MalformedMessage(f"kind: {header.kind}, not {kind}")
    if header.incarnation != incarnation:
        raise MalformedMessage(f"incarnation: {header.incarnation}, not the peer's {incarnation}")
    if header.body_bytes > max_body_bytes:
        raise MalformedMessage(f"body_bytes: {header.body_bytes}, at most {max_body_bytes}")
    return header


def opener(kind: Kind, incarnation: int, max_body_bytes: int) -> Callable[[bytes], Header]:
    """`open_header` for one end of a link."""
    return functools.partial(open_header, kind=kind, incarnation=incarnation, max_body_bytes=max_body_bytes)


def check_call(header: Header, shape: ChannelShape) -> None:
    """Raises MalformedMessage, which names the field."""
    combine, num_rows, num_assignments = header.combine, header.num_rows, header.num_assignments
    _expect("dtype", header.dtype, DTYPE_CODES[shape.dtype])
    _expect("hidden_size", header.hidden_size, shape.hidden_size)
    if combine >= len(COMBINES):
        raise MalformedMessage(f"combine: {combine} is none")
    if header.status or header.queue_us or header.compute_us or header.merged_rows or header.reserved:
        raise MalformedMessage("status: a call has none, nor times")
    if num_rows > shape.max_rows:
        raise MalformedMessage(f"num_rows: {num_rows}, at most {shape.max_rows}")
    most = 0 if combine == _ROWS else num_rows * shape.max_choices
    if num_assignments > most:
        raise MalformedMessage(f"num_assignments: {num_assignments}, at most {most}")
    _expect("body_bytes", header.body_bytes, call_body_bytes(shape, combine, num_rows, num_assignments))


def check_answer(header: Header, call: Call, shape: ChannelShape) -> None:
    """Raises MalformedMessage, which names the field."""
    status, combine = header.status, call.combine
    if status >= len(STATUSES):
        raise MalformedMessage(f"status: {status} is none")
    num_rows = answer_rows(call) if status == _OK else 0
    expected = (
        DTYPE_CODES[answer_dtype(shape, combine)],
        combine,
        status,
        call.lane,
        call.layer,
        call.attempt,
        num_rows,
        call.ticket,
        call.step,
        call.placement,
        header.incarnation,
        call.rows_A.shape[0],
        shape.hidden_size,
    )
    if header[_FIRST:_END] != expected:
        for field, value, wanted in zip(Header._fields[_FIRST:_END], header[_FIRST:_END], expected, strict=True):
            _expect(field, value, wanted)
    _expect("reserved", header.reserved, 0)
    _expect("body_bytes", header.body_bytes, answer_body_bytes(shape, combine, num_rows))


def answer_rows(call: Call) -> int:
    """How many rows the answer to a call has."""
    rows = call.rows_A if call.combine == _SLOTS else call.rows_TC
    return rows.shape[0]


def _expect(field: str, value: object, expected: object) -> None:
    if value != expected:
        raise MalformedMessage(f"{field}: {value}, not {expected}")
