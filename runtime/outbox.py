"""What waits to be sent, bounded in number and in bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from anabranch.errors import Overloaded

T = TypeVar("T")

MAX_MESSAGES = 10_000
MAX_BYTES = 64 << 20


class Outbox(Generic[T]):
    """First in, first out; any thread puts, one takes.

    Args:
        name: for the error.
        ring: called after each `put`, on its thread: wakes the one who takes. Must not block.
    """

    def __init__(
        self, name: str, ring: Callable[[], None], *, max_messages: int = MAX_MESSAGES, max_bytes: int = MAX_BYTES
    ) -> None:
        self._name = name
        self._ring = ring
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._waiting: deque[tuple[T, int]] = deque()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, message: T, num_bytes: int) -> None:
        """Queue a message that takes `num_bytes` as it is sent. Raises Overloaded where there is no room."""
        with self._lock:
            if len(self._waiting) >= self._max_messages or self._num_bytes + num_bytes > self._max_bytes:
                raise Overloaded(
                    f"{self._name}: {len(self._waiting)} messages of {self._num_bytes} bytes wait to be sent; "
                    f"at most {self._max_messages} of {self._max_bytes} bytes may"
                )
            self._waiting.append((message, num_bytes))
            self._num_bytes += num_bytes
        self._ring()

    def take(self) -> T | None:
        """The oldest message; None where there is none."""
        with self._lock:
            if not self._waiting:
                return None
            message, num_bytes = self._waiting.popleft()
            self._num_bytes -= num_bytes
            return message
