"""Both ends of an M2N channel in one process, calls to send over it, and what a node makes of them."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import xxhash

from anabranch.errors import TransportUnavailable
from benchmarks.m2n_ends import connect, make_call, next_calls
from transport.m2n import (
    Answer,
    Arrived,
    Call,
    ChannelShape,
    Combine,
    Link,
    LinkMaker,
    Listener,
    Status,
    create_link_maker,
    create_listener,
    usable_backends,
)
from transport.m2n.header import HEADER_BYTES


def _reason(backend: str) -> str:
    try:
        usable_backends(backend)
    except TransportUnavailable as error:
        return str(error)
    return ""


REASONS = {backend: _reason(backend) for backend in ("shm", "tcp", "ucx")}
BACKENDS = [
    pytest.param(backend, marks=pytest.mark.skipif(bool(reason), reason=reason)) for backend, reason in REASONS.items()
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = ChannelShape(model="a model", dtype=torch.bfloat16, hidden_size=36, max_rows=16, max_choices=3, num_slots=4)
# Offset and format of each field on the wire.
HEADER_FIELDS = {
    "magic": (0, "4s"), "version": (4, "H"), "kind": (6, "B"), "dtype": (7, "B"), "combine": (8, "B"),
    "status": (9, "B"), "lane": (10, "H"), "layer": (12, "I"), "attempt": (16, "I"), "num_rows": (20, "I"),
    "ticket": (24, "Q"), "step": (32, "Q"), "placement": (40, "Q"), "incarnation": (48, "Q"),
    "num_assignments": (56, "I"), "hidden_size": (60, "I"), "queue_us": (64, "I"), "compute_us": (68, "I"),
    "merged_rows": (72, "I"), "reserved": (76, "I"), "body_bytes": (80, "Q"), "body_checksum": (88, "Q"),
}  # fmt: skip


class Channel:
    """A listener and a link maker.

    Attributes:
        links: what was connected.
    """

    def __init__(self, backend: str, shape: ChannelShape = SHAPE) -> None:
        self.shape = shape
        self.listener: Listener = create_listener(shape, backend)
        self.maker: LinkMaker = create_link_maker(shape, backend)
        self.links: list[Link] = []

    def connect(self) -> Link:
        """A new link of `maker`; the listener is polled meanwhile and must have no calls."""
        self.links.append(connect(self.listener, self.maker))
        return self.links[-1]

    def arrived(self, number: int = 1) -> list[Arrived]:
        """The next calls at the node."""
        return next_calls(self.listener, number)

    def close(self) -> None:
        self.maker.close()
        self.listener.close()


@contextmanager
def channel(backend: str, shape: ChannelShape = SHAPE, num_links: int = 1) -> Iterator[Channel]:
    """A channel with links, closed with the block."""
    made = Channel(backend, shape)
    try:
        for _ in range(num_links):
            made.connect()
        yield made
    finally:
        made.close()


def a_call(
    ticket: int,
    shape: ChannelShape = SHAPE,
    *,
    num_rows: int = 3,
    num_choices: int = 2,
    combine: Combine = Combine.ROWS,
    attempt: int = 0,
) -> Call:
    """A call with values that depend on its ticket; `num_choices` assignments of each row."""
    generator = torch.Generator().manual_seed(ticket)
    is_sparse, size = combine != Combine.ROWS, (num_rows, num_choices)
    return make_call(
        torch.randn(num_rows, shape.hidden_size, generator=generator).to(shape.dtype),
        ticket=ticket,
        step=ticket + 7,
        layer=ticket % 61,
        lane=ticket % 4,
        attempt=attempt,
        experts_TS=torch.randint(0, 8, size, generator=generator, dtype=torch.int32) if is_sparse else None,
        weights_TS=torch.rand(size, generator=generator) if combine == Combine.SUMS else None,
    )


def compute(call: Call) -> torch.Tensor:
    """What a node makes of a call's rows: each expert multiplies by its number plus 2."""
    rows_TC = call.rows_TC
    if call.combine == Combine.ROWS:
        return rows_TC * 2
    slots_AC = rows_TC[call.rows_A.long()] * (call.experts_A + 2)[:, None].to(rows_TC.dtype)
    if call.combine == Combine.SLOTS:
        return slots_AC
    sums_TC = torch.zeros(rows_TC.shape)
    return sums_TC.index_add_(0, call.rows_A.long(), slots_AC.float() * call.weights_A[:, None])


def an_answer(call: Call, *, merged_rows: int = 5) -> Answer:
    """The right answer to a call."""
    return Answer(
        ticket=call.ticket,
        attempt=call.attempt,
        status=Status.OK,
        rows_RC=compute(call),
        queue_us=11,
        compute_us=12,
        merged_rows=merged_rows,
    )


def assert_same(got: Call | Answer, wanted: Call | Answer) -> None:
    """Equal field by field, tensors bit for bit and in dtype and shape."""
    assert type(got) is type(wanted)
    for field in wanted.__struct_fields__:
        mine, theirs = getattr(got, field), getattr(wanted, field)
        if isinstance(theirs, torch.Tensor):
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, field
            assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), field
        else:
            assert mine == theirs and type(mine) is type(theirs), field.name


def altered(data: bytes, field: str, value: object) -> bytes:
    """The header with another value in a field, and the checksum that belongs to it."""
    offset, kind = HEADER_FIELDS[field]
    changed = bytearray(data)
    struct.pack_into(f"<{kind}", changed, offset, value)
    struct.pack_into("<Q", changed, HEADER_BYTES - 8, xxhash.xxh3_64_intdigest(bytes(changed[: HEADER_BYTES - 8])))
    return bytes(changed)


def process_shape(hidden_size: int) -> ChannelShape:
    """The shape that both processes of a test use."""
    return dataclasses.replace(SHAPE, dtype=torch.float32, hidden_size=hidden_size, max_rows=64, num_slots=16)
