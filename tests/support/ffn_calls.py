"""Calls to an FFN node, and a listener in memory that brings them and keeps the answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from transport.m2n.base import Arrived
from transport.m2n.messages import Answer, Call


def arrived(call: Call, sender: int = 0, arrived_s: float | None = None) -> Arrived:
    return Arrived(call=call, sender=sender, arrived_s=time.monotonic() if arrived_s is None else arrived_s, token=None)


class MemoryListener:
    """`Listener` whose links are numbers."""

    def __init__(self, num_links: int = 1) -> None:
        self.addresses = {"memory": "here"}
        self.num_links = num_links
        self.answers: dict[int, Answer] = {}
        self.order: list[int] = []
        self.closed = False
        self._changed = threading.Condition()
        self._calls: list[Arrived] = []
        self._woken = False

    def bring(self, *calls: Call, sender: int = 0) -> None:
        """Let calls come, all at once."""
        with self._changed:
            self._calls += [arrived(call, sender) for call in calls]
            self._changed.notify_all()

    def await_answers(self, *tickets: int, timeout_s: float = 30.0) -> list[Answer]:
        with self._changed:
            assert self._changed.wait_for(lambda: set(tickets) <= self.answers.keys(), timeout_s), tickets
            return [self.answers[ticket] for ticket in tickets]

    def poll(self) -> Sequence[Arrived]:
        with self._changed:
            calls, self._calls = self._calls, []
            return calls

    def answer(self, arrived: Arrived, answer: Answer) -> None:
        with self._changed:
            assert answer.ticket not in self.answers
            self.answers[answer.ticket] = answer
            self.order.append(answer.ticket)
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._calls or self._woken, timeout_s)
            self._woken = False

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None:
        self.closed = True
