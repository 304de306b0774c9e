"""Futures that a plane resolves: once, from its progress thread, whatever their owner did to them."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError


def succeed(future: Future[None]) -> None:
    try:
        future.set_result(None)
    except InvalidStateError:
        pass  # its owner cancelled it


def fail(future: Future[None], error: Exception) -> None:
    try:
        future.set_exception(error)
    except InvalidStateError:
        pass


def failed(error: Exception) -> Future[None]:
    """A future that has failed already."""
    future: Future[None] = Future()
    future.set_exception(error)
    return future
