"""Bounds of numeric flags: a number that makes no sense is refused by the flag's name, before anything is done."""

from __future__ import annotations

from collections.abc import Callable

import typer

from anabranch_client.calls import MAX_TIMEOUT_S

MAX_INT = 2**63 - 1


def within(least: float, most: float, *, or_least: bool = True) -> Callable[[float | None], float | None]:
    """A callback of a typer option, with one argument; lets None through.

    Args:
        or_least: whether `least` itself is allowed.
    """
    words = f"{'at least' if or_least else 'above'} {least:.12g} and at most {most:.12g}"

    def check(value: float | None) -> float | None:
        # Also false for what is not a number: it compares with nothing.
        if value is None or (least <= value <= most and (or_least or value > least)):
            return value
        raise typer.BadParameter(f"must be {words}.")

    return check


def seconds() -> Callable[[float | None], float | None]:
    """The callback of a deadline in seconds."""
    return within(0, MAX_TIMEOUT_S, or_least=False)
