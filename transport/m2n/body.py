"""The body of a message: tensors to bytes without a copy, and bytes to tensors without one.

A call's body is its rows, the experts of its assignments, their rows, and with `Combine.SUMS` their weights. An
answer's is its rows. Each part begins at a multiple of ALIGNMENT.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
import xxhash

from anabranch.errors import ChecksumMismatch, MalformedMessage
from transport.m2n.base import ChannelShape
from transport.m2n.header import ALIGNMENT, COMBINES, STATUSES, aligned, answer_dtype, answer_rows
from transport.m2n.messages import Answer, Call, Combine, Status
from transport.m2n.pipe import Message

# Of any length: what is looked at is cut from it.
_Bytes = ctypes.c_char * (1 << 40)
_NO_INDEX = torch.empty(0, dtype=torch.int32)
_NO_WEIGHTS = torch.empty(0)
_ROWS, _, _SUMS = Combine  # a member's look-up costs more than a comparison
_OK = Status.OK
_FEW = 64  # up to here a loop is faster than numpy's call
_PADDING = memoryview(bytes(ALIGNMENT))


def call_parts(call: Call, shape: ChannelShape) -> list[torch.Tensor]:
    """The tensors of a call as they are sent.

    Raises:
        ValueError: one of them has another dtype or size than the channel.
    """
    rows_TC, num_assignments = call.rows_TC, call.rows_A.shape[0]
    _check_rows("rows_TC", rows_TC, shape.max_rows, shape.hidden_size, shape.dtype)
    if num_assignments > (0 if call.combine == _ROWS else rows_TC.shape[0] * shape.max_choices):
        raise ValueError(f"rows_A: {num_assignments} assignments of {rows_TC.shape[0]} rows, {call.combine.name}")
    if not num_assignments:
        return [_flat(rows_TC)]
    parts = [_flat(rows_TC), _column("experts_A", call.experts_A, num_assignments, torch.int32)]
    parts.append(_column("rows_A", call.rows_A, num_assignments, torch.int32))
    if call.combine == _SUMS:
        parts.append(_column("weights_A", call.weights_A, num_assignments, torch.float32))
    return parts


def answer_parts(answer: Answer, call: Call, shape: ChannelShape) -> list[torch.Tensor]:
    """The tensors of an answer as they are sent.

    Raises:
        ValueError: it does not fit the call.
    """
    rows_RC = answer.rows_RC
    if answer.ticket != call.ticket or answer.attempt != call.attempt:
        raise ValueError(f"ticket {answer.ticket}.{answer.attempt}: the call's is {call.ticket}.{call.attempt}")
    num_rows = answer_rows(call) if answer.status == _OK else 0
    if rows_RC.shape[0] != num_rows:
        raise ValueError(f"rows_RC: {rows_RC.shape[0]} rows with {answer.status.name}, not {num_rows}")
    if num_rows:
        _check_rows("rows_RC", rows_RC, num_rows, shape.hidden_size, answer_dtype(shape, call.combine))
    return [_flat(rows_RC)]


def _check_rows(name: str, x: torch.Tensor, max_rows: int, hidden_size: int, dtype: torch.dtype) -> None:
    shape = x.shape
    if len(shape) != 2 or shape[0] > max_rows or shape[1] != hidden_size or x.dtype is not dtype:
        raise ValueError(f"{name}: {tuple(x.shape)} {x.dtype}, not at most ({max_rows}, {hidden_size}) {dtype}")


def _column(name: str, x: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    if x.dim() != 1 or x.shape[0] != length or x.dtype is not dtype:
        raise ValueError(f"{name}: {tuple(x.shape)} {x.dtype}, not ({length},) {dtype}")
    return _flat(x)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_contiguous() and x.is_cpu else x.cpu().contiguous()


def body_of(parts: Sequence[torch.Tensor]) -> list[memoryview]:
    """The bytes that the parts make, in order; valid as long as the parts are held."""
    body: list[memoryview] = []
    for part in parts:
        num_bytes = part.nbytes
        if num_bytes:
            body.append(memoryview(_Bytes.from_address(part.data_ptr())).cast("B")[:num_bytes])
            if num_bytes % ALIGNMENT:
                body.append(_PADDING[num_bytes % ALIGNMENT :])
    return body


def checksum_of(body: Sequence[memoryview]) -> int:
    """xxh3-64 of these bytes, never 0."""
    if len(body) == 1:
        return xxhash.xxh3_64_intdigest(body[0]) or 1
    hasher = xxhash.xxh3_64()
    for part in body:
        hasher.update(part)
    return hasher.intdigest() or 1


def check_body(message: Message) -> None:
    """Raises ChecksumMismatch where the body is not what was sent."""
    header = message.header
    if header.body_checksum:
        checksum = message.checksum
        if checksum is None:
            checksum = checksum_of([message.region.memory[message.offset : message.offset + header.body_bytes]])
        if checksum != header.body_checksum:
            raise ChecksumMismatch("body_checksum: the body is damaged")


def view_call(message: Message, shape: ChannelShape) -> Call:
    """A call whose tensors lie in the message; its header has been checked.

    Raises:
        MalformedMessage: an assignment is of a row that there is not.
    """
    header, region, offset = message.header, message.region, message.offset
    num_rows, num_assignments = header.num_rows, header.num_assignments
    rows_TC = region.matrix(shape.dtype, offset, num_rows, shape.hidden_size)
    experts_A = rows_A = _NO_INDEX
    weights_A = _NO_WEIGHTS
    if num_assignments:
        experts = offset + aligned(num_rows * shape.hidden_size * shape.dtype.itemsize)
        length = aligned(4 * num_assignments)
        rows = experts + length
        # Unsigned: a row below 0 is a very large one.
        words = region.words[rows // 4 : rows // 4 + num_assignments]
        highest = max(words) if num_assignments <= _FEW else int(np.asarray(words).max())
        if highest >= num_rows:
            raise MalformedMessage(f"rows_A: row {highest} of {num_rows}")
        experts_A = region.column(torch.int32, experts, num_assignments)
        rows_A = region.column(torch.int32, rows, num_assignments)
        if header.combine == _SUMS:
            weights_A = region.column(torch.float32, rows + length, num_assignments)
    return Call(
        ticket=header.ticket,
        step=header.step,
        layer=header.layer,
        lane=header.lane,
        attempt=header.attempt,
        placement=header.placement,
        combine=COMBINES[header.combine],
        rows_TC=rows_TC,
        rows_A=rows_A,
        experts_A=experts_A,
        weights_A=weights_A,
    )


def view_answer(message: Message, shape: ChannelShape) -> Answer:
    """An answer whose rows lie in the message; its header has been checked."""
    header = message.header
    dtype = answer_dtype(shape, header.combine)
    return Answer(
        ticket=header.ticket,
        attempt=header.attempt,
        status=STATUSES[header.status],
        rows_RC=message.region.matrix(dtype, message.offset, header.num_rows, shape.hidden_size),
        queue_us=header.queue_us,
        compute_us=header.compute_us,
        merged_rows=header.merged_rows,
    )
