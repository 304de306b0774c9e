"""What an FFN worker's driving rank tells its other ranks, and what they say."""

from __future__ import annotations

import msgspec

from anabranch.protocol.wire_error import WireError


class FfnCommand(msgspec.Struct, frozen=True, kw_only=True, tag_field="c"):
    """Base of commands; obeyed in the order of sending."""


class Load(FfnCommand, frozen=True, kw_only=True, tag="load"):
    """Read these (layer, expert) while computing goes on; answered with Loaded unless another Load comes meanwhile."""

    number: int
    experts: tuple[tuple[int, int], ...]


class Drop(FfnCommand, frozen=True, kw_only=True, tag="drop"):
    """Forget these."""

    experts: tuple[tuple[int, int], ...]


class Compute(FfnCommand, frozen=True, kw_only=True, tag="compute"):
    """Take part in a product; its sums are the answer, and every rank's the same.

    Attributes:
        rows: `[T, C]` in the model's dtype.
        rows_A, experts_A: int32; none: a dense layer.
    """

    layer: int
    rows: bytes
    rows_A: bytes
    experts_A: bytes


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's only event: what a Load named is here, or why not."""

    number: int
    error: WireError | None = None


AnyCommand = Load | Drop | Compute
