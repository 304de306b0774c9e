"""What has happened to workers, numbered: operators and launchers follow it, from any number that is still kept.

    came -> [suspect -> ready] [cordoned -> ready] [draining] -> gone -> [fenced]

A worker is fenced when it speaks though it counts as gone: it is told so, and its connection ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal

from anabranch.errors import InvalidRequest
from anabranch.protocol.workers import Role, WorkerInfo

MAX_EVENTS = 1024
# Of consoles and launchers at a time.
MAX_FOLLOWERS = 16
MAX_REASON_CHARS = 1000

Change = Literal["came", "ready", "suspect", "cordoned", "draining", "gone", "fenced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEvent:
    """One change of one worker.

    Attributes:
        sequence: counts from 1.
        at_s: Unix time.
        reason: in words; empty where the change says it all.
    """

    sequence: int
    at_s: float
    worker: str
    role: Role
    pid: int
    change: Change
    reason: str


class WorkerLog:
    """The latest MAX_EVENTS events; belongs to one event loop."""

    def __init__(self) -> None:
        self._events: deque[WorkerEvent] = deque(maxlen=MAX_EVENTS)
        self._next_sequence = 1
        self._followers: set[asyncio.Event] = set()
        self._closed = False

    def add(self, info: WorkerInfo, change: Change, reason: str = "") -> None:
        """Note a change, and wake who follows."""
        event = WorkerEvent(
            sequence=self._next_sequence,
            at_s=time.time(),
            worker=info.name,
            role=info.role,
            pid=info.pid,
            change=change,
            reason=reason[:MAX_REASON_CHARS],
        )
        self._next_sequence += 1
        self._events.append(event)
        for news in self._followers:
            news.set()

    async def follow(self, first: int) -> AsyncGenerator[tuple[int, WorkerEvent]]:
        """Events from sequence number `first` on (0: the oldest that is kept), and each later one, until `close`.

        Yields:
            How many of those that were due before it are no longer kept, and the event.

        Raises:
            InvalidRequest: `first` is negative or beyond the next number; or too many follow.
        """
        if not 0 <= first <= self._next_sequence:
            raise InvalidRequest(
                f"{first}: give 0 to {self._next_sequence}; an orchestrator that started again counts from 1", "first"
            )
        if len(self._followers) >= MAX_FOLLOWERS:
            raise InvalidRequest(f"{MAX_FOLLOWERS} follow already; end one of them", "first")
        news = asyncio.Event()
        self._followers.add(news)
        try:
            due = first or self._oldest
            while not self._closed:
                news.clear()
                while due < self._next_sequence:
                    num_missed = max(0, self._oldest - due)
                    event = self._events[due + num_missed - self._oldest]
                    due = event.sequence + 1
                    yield num_missed, event
                await news.wait()
        finally:
            self._followers.discard(news)

    @property
    def _oldest(self) -> int:
        return self._next_sequence - len(self._events)

    def close(self) -> None:
        """Let nobody follow any longer."""
        self._closed = True
        for news in self._followers:
            news.set()
