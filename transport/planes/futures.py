"""Futures that a plane resolves: once, from its progress thread, whatever their owner did to them."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, InvalidStateError


def succeed(future: Future[None]) -> None:
    with contextlib.suppress(InvalidStateError):  # its owner cancelled it
        future.set_result(None)


def fail(future: Future[None], error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)


def failed(error: Exception) -> Future[None]:
    """A future that has failed already."""
    future: Future[None] = Future()
    future.set_exception(error)
    return future
