"""Headers: every field is looked at before a tensor is made."""

from __future__ import annotations

import dataclasses
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ChecksumMismatch, MalformedMessage
from tests.support.m2n import HEADER_FIELDS, SHAPE, a_call, altered, an_answer
from transport.m2n import Combine
from transport.m2n.body import answer_parts, body_of, call_parts
from transport.m2n.header import (
    HEADER_BYTES,
    Kind,
    answer_body_bytes,
    call_body_bytes,
    check_answer,
    check_call,
    max_answer_bytes,
    max_call_bytes,
    open_header,
    pack_answer,
    pack_call,
)

pytestmark = pytest.mark.unit

INCARNATION = 77
CALL = a_call(5, combine=Combine.SUMS)
CALL_BYTES = pack_call(CALL, SHAPE, INCARNATION, 0)
MOST = max_call_bytes(SHAPE) - HEADER_BYTES


def opened(data: bytes, kind: Kind = Kind.CALL) -> object:
    return open_header(data, kind=kind, incarnation=INCARNATION, max_body_bytes=MOST)


def test_a_header_is_128_bytes_and_says_what_was_packed() -> None:
    assert len(CALL_BYTES) == HEADER_BYTES == 128
    header = opened(CALL_BYTES)
    expected = {
        "magic": b"ANBM", "version": 1, "kind": 1, "dtype": 1, "combine": 2, "status": 0, "lane": CALL.lane,
        "layer": CALL.layer, "attempt": 0, "num_rows": 3, "ticket": 5, "step": CALL.step, "placement": 1,
        "incarnation": INCARNATION, "num_assignments": 6, "hidden_size": 36, "queue_us": 0, "compute_us": 0,
        "merged_rows": 0, "reserved": 0, "body_bytes": 216 + 3 * 24, "body_checksum": 0,
    }  # fmt: skip
    assert header._asdict() == expected  # type: ignore[attr-defined]
    for field, (offset, kind) in HEADER_FIELDS.items():
        assert struct.unpack_from(f"<{kind}", CALL_BYTES, offset)[0] == expected[field], field


@given(at=st.integers(0, HEADER_BYTES - 1), bit=st.integers(0, 7))
def test_any_bit_that_flips_is_noticed(at: int, bit: int) -> None:
    damaged = bytearray(CALL_BYTES)
    damaged[at] ^= 1 << bit
    with pytest.raises((ChecksumMismatch, MalformedMessage), match=r"magic|version|header_checksum"):
        opened(bytes(damaged))


@given(data=st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_noise_is_no_header(data: bytes) -> None:
    with pytest.raises((ChecksumMismatch, MalformedMessage)):
        opened(data)


FRAME = [
    ("magic", b"ANBP"), ("version", 2), ("kind", Kind.ANSWER), ("kind", 0), ("incarnation", INCARNATION + 1),
    ("body_bytes", MOST + 1), ("body_bytes", 2**64 - 1),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), FRAME)
def test_a_broken_frame_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(MalformedMessage, match=f"^{field}:"):
        opened(altered(CALL_BYTES, field, value))


CALL_FIELDS = [
    ("dtype", 0), ("dtype", 200), ("combine", 3), ("combine", 255), ("status", 1), ("num_rows", SHAPE.max_rows + 1),
    ("num_rows", 2**32 - 1), ("num_assignments", 10), ("num_assignments", 2**32 - 1), ("hidden_size", 35),
    ("hidden_size", 0), ("body_bytes", 0), ("body_bytes", 208),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), CALL_FIELDS)
def test_a_wrong_field_of_a_call_is_refused_by_name(field: str, value: int) -> None:
    header = open_header(
        altered(CALL_BYTES, field, value), kind=Kind.CALL, incarnation=INCARNATION, max_body_bytes=MOST
    )
    with pytest.raises(MalformedMessage, match=f"^{field}:"):
        check_call(header, SHAPE)


def test_rows_alone_have_no_assignments() -> None:
    header = open_header(CALL_BYTES, kind=Kind.CALL, incarnation=INCARNATION, max_body_bytes=MOST)
    with pytest.raises(MalformedMessage, match="num_assignments: 6, at most 0"):
        check_call(header._replace(combine=Combine.ROWS), SHAPE)


ANSWER_FIELDS = [
    "dtype", "combine", "status", "lane", "layer", "attempt", "num_rows", "ticket", "step", "placement",
    "num_assignments", "hidden_size", "reserved", "body_bytes",
]  # fmt: skip


@pytest.mark.parametrize("field", ANSWER_FIELDS)
def test_a_wrong_field_of_an_answer_is_refused_by_name(field: str) -> None:
    call = open_header(CALL_BYTES, kind=Kind.CALL, incarnation=INCARNATION, max_body_bytes=MOST)
    data = pack_answer(an_answer(CALL), call, SHAPE, INCARNATION, 0)
    answer = open_header(data, kind=Kind.ANSWER, incarnation=INCARNATION, max_body_bytes=MOST)
    check_answer(answer, CALL, SHAPE)
    with pytest.raises(MalformedMessage, match=rf"^{'num_rows' if field == 'status' else field}:"):
        check_answer(answer._replace(**{field: getattr(answer, field) + 1}), CALL, SHAPE)
    with pytest.raises(MalformedMessage, match=r"^status: 9 is none"):
        check_answer(answer._replace(status=9), CALL, SHAPE)


@pytest.mark.parametrize("combine", list(Combine))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sizes_are_what_the_formula_says(combine: Combine, dtype: torch.dtype) -> None:
    shape = dataclasses.replace(SHAPE, dtype=dtype, hidden_size=35)
    for num_rows, num_choices in ((0, 3), (1, 1), (16, 3), (5, 2)):
        call = a_call(1, shape, num_rows=num_rows, num_choices=num_choices, combine=combine)
        num_assignments = call.rows_A.shape[0]
        num_bytes = sum(part.nbytes for part in body_of(call_parts(call, shape)))
        assert num_bytes == call_body_bytes(shape, combine, num_rows, num_assignments) <= max_call_bytes(shape) - 128
        answer = an_answer(call)
        num_bytes = sum(part.nbytes for part in body_of(answer_parts(answer, call, shape)))
        assert num_bytes == answer_body_bytes(shape, combine, answer.rows_RC.shape[0]) <= max_answer_bytes(shape) - 128
