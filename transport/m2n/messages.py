"""What travels between an attention rank and an FFN node: a call with rows, and its answer.

They are structs of msgspec, never encoded: those are made ten times as fast as frozen dataclasses of so many fields.

Shape suffixes: T rows of a call, A assignments (a row and one of its experts), R rows of an answer, C hidden.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec
import torch


class Status(IntEnum):
    """How a call ended at its node."""

    OK = 0
    NOT_HELD = 1
    """An expert of the call is not here (any more)."""
    MALFORMED = 2
    """The header, a size or the checksum is wrong."""
    FAILED = 3
    """Computing it raised."""


class Combine(IntEnum):
    """What the rows of an answer are."""

    ROWS = 0
    """One row of each row of the call, in the model's dtype: a dense layer, that is one expert for all rows."""
    SLOTS = 1
    """One row of each assignment, unweighted, in the model's dtype and the call's order."""
    SUMS = 2
    """One row of each row of the call, in float32: the weighted sum of its assignments, in the call's order."""


class Call(msgspec.Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """Rows that one FFN node is to compute; a pure function of them.

    Attributes:
        ticket: the sender's number for this message, never used twice on a link.
        step, lane: the plan that it belongs to; for logs and statistics.
        attempt: 0 for the first sending of these rows.
        placement: version of the placement by which the node was chosen.
        rows_TC: in the model's dtype, contiguous.
        rows_A, experts_A: int32; row and expert of each assignment. Empty with `Combine.ROWS`.
        weights_A: float32; only with `Combine.SUMS`, else empty.
    """

    ticket: int
    step: int
    layer: int
    lane: int
    attempt: int
    placement: int
    combine: Combine
    rows_TC: torch.Tensor
    rows_A: torch.Tensor
    experts_A: torch.Tensor
    weights_A: torch.Tensor


class Answer(msgspec.Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """What a node made of a call.

    Attributes:
        ticket, attempt: the call's.
        rows_RC: see `Combine`; no rows unless the status is OK.
        queue_us, compute_us: how long the call waited at the node, and how long the product that it was part of took.
        merged_rows: rows of that product.
    """

    ticket: int
    attempt: int
    status: Status
    rows_RC: torch.Tensor
    queue_us: int = 0
    compute_us: int = 0
    merged_rows: int = 0
