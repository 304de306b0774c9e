"""Counts of how things ended, by phase: gRPC statuses with the error's code, or what a phase counts itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import grpc
import grpc.aio

from anabranch_client.errors import code_of

# What a server says of itself when a handler has raised, and gRPC's word for an exception that nobody named.
FAULTS = ("INTERNAL", "UNKNOWN")


class Tally:
    """How many ended how.

    Attributes:
        counts: (phase, end) -> number; an end is `OK`, or `STATUS.code`, as in `INVALID_ARGUMENT.invalid_request`.
        details: the first message of each end that is a fault, for whoever looks for it.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.details: dict[tuple[str, str], str] = {}

    def count(self, phase: str, end: str, number: int = 1) -> None:
        self.counts[phase, end] += number

    def call(self, phase: str, status: grpc.StatusCode, code: str = "", details: str = "") -> None:
        """Count a call's end. `code` is empty where gRPC itself, and none of our handlers, ended it."""
        end = status.name if status is grpc.StatusCode.OK else f"{status.name}.{code or 'grpc'}"
        self.counts[phase, end] += 1
        if status.name in FAULTS:
            self.details.setdefault((phase, end), details)

    def error(self, phase: str, error: grpc.aio.AioRpcError) -> None:
        """Count a call that ended with a status."""
        code = code_of(error.trailing_metadata()) or ""
        self.call(phase, error.code(), code, error.details() or "")

    def num_faults(self, status: str) -> int:
        """Calls of all phases that ended with this status."""
        return sum(number for (_, end), number in self.counts.items() if end.partition(".")[0] == status)

    def total(self, phase: str) -> int:
        return sum(number for (found, _), number in self.counts.items() if found == phase)

    def __iter__(self) -> Iterator[tuple[str, str, int]]:
        """Phase, end and number, in a stable order."""
        for (phase, end), number in sorted(self.counts.items()):
            yield phase, end, number
