"""One wait for everything that an end of the channel has: sockets, and messages in shared memory.

It spins for a short time first, for answers come within a fraction of a millisecond, and then sleeps. While it sleeps,
a peer that writes to shared memory sends a byte through the link's socket.
"""

from __future__ import annotations

import array
import select
import time
from collections.abc import Callable
from typing import Protocol

from transport.m2n.build import load_library

# A wait spins for the longer time where waits have lately been that short, else for the shorter: where others compute,
# who spins loses the core for milliseconds, while a sleeper that is woken runs at once.
MIN_SPIN_S, MAX_SPIN_S = 20e-6, 200e-6
LOOK_S = 1e-3
"""Sockets are looked at this often while messages keep coming through shared memory."""

ARM_ATTEMPTS = 16


class Progress(Protocol):
    """What goes on only where it is called."""

    def progress(self) -> bool:
        """Whether there may be something to take."""
        ...

    def arm(self) -> bool:
        """Call by a descriptor when something happens; False where something has happened already."""
        ...


Handler = Callable[[int], bool]
"""Handles the events of a socket; whether there may be something to take now."""


class Waiter:
    """Watches sockets and shared memory. One thread calls its methods."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._epoll_fd = self._epoll.fileno()
        self._handlers: dict[int, Handler] = {}
        self._ends = array.array("Q")
        self._progresses: list[Progress] = []
        self._looked_s = 0.0
        self._spin_s = MIN_SPIN_S

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Call `handler` when a descriptor has one of the events, or is at its end."""
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def change(self, fd: int, events: int) -> None:
        """Watch for other events."""
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Watch a descriptor no more; before it is closed. Idempotent."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def add_end(self, end: int) -> None:
        """Watch an end in shared memory, by its native handle."""
        self._ends.append(end)

    def remove_end(self, end: int) -> None:
        """Before it is freed. Idempotent."""
        if end in self._ends:
            self._ends.remove(end)

    def add_progress(self, progress: Progress) -> None:
        """Let something go on while waiting; the descriptor by which it calls is watched too."""
        assert not self._ends, "a channel over UCX has no shared memory of its own: see `usable_backends`"
        self._progresses.append(progress)

    def remove_progress(self, progress: Progress) -> None:
        """Idempotent."""
        if progress in self._progresses:
            self._progresses.remove(progress)

    def look(self) -> bool:
        """Handle what the sockets have now; whether there may be something to take."""
        self._looked_s = time.monotonic()
        return self._handle(self._epoll.poll(0))

    def _handle(self, found: list[tuple[int, int]]) -> bool:
        may_take = False
        for fd, events in found:
            handler = self._handlers.get(fd)  # an earlier handler may have ended it
            if handler is not None and handler(events):
                may_take = True
        return may_take

    def look_sometimes(self) -> None:
        """Like `look`, unless that was a moment ago."""
        if time.monotonic() - self._looked_s >= LOOK_S:
            self.look()

    def wait(self, timeout_s: float) -> None:
        """Return as soon as there may be something to take, at the latest after `timeout_s`."""
        began_s = time.monotonic()
        wait = self._wait_progress if self._progresses else self._wait_native if self._ends else self._wait_sockets
        left_s = timeout_s
        while True:
            found = wait(left_s)
            waited_s = time.monotonic() - began_s
            if found or waited_s >= timeout_s:
                break
            left_s = timeout_s - waited_s
        was_short = waited_s < MAX_SPIN_S
        self._spin_s = min(2 * self._spin_s, MAX_SPIN_S) if was_short else max(self._spin_s / 2, MIN_SPIN_S)

    def _wait_native(self, timeout_s: float) -> bool:
        """Whether there may be something to take; at the latest after `timeout_s`."""
        address, num_ends = self._ends.buffer_info()
        spin_ns, timeout_ns = int(self._spin_s * 1e9), int(timeout_s * 1e9)
        if load_library().anabranch_m2n_wait(address, num_ends, self._epoll_fd, spin_ns, timeout_ns) != 1:
            return self.look()
        self.look_sometimes()
        return True

    def _wait_sockets(self, timeout_s: float) -> bool:
        """The same without shared memory."""
        start_s = time.monotonic()
        while True:
            found = self._epoll.poll(0)
            waited_s = time.monotonic() - start_s
            if found or waited_s >= min(timeout_s, self._spin_s):
                break
        if not found and waited_s < timeout_s:
            found = self._epoll.poll(timeout_s - waited_s)
        self._looked_s = time.monotonic()
        return self._handle(found)

    def _wait_progress(self, timeout_s: float) -> bool:
        """The same with what has to be let go on by calls."""
        start_s = time.monotonic()
        while True:
            if any(progress.progress() for progress in self._progresses):
                self.look_sometimes()
                return True
            if self.look():
                return True
            waited_s = time.monotonic() - start_s
            if waited_s >= min(timeout_s, self._spin_s):
                break
        if waited_s >= timeout_s or not all(_armed(progress) for progress in self._progresses):
            return False
        found = self._epoll.poll(timeout_s - waited_s)
        self._looked_s = time.monotonic()
        return self._handle(found)

    def close(self) -> None:
        self._handlers.clear()
        self._epoll.close()


def _armed(progress: Progress) -> bool:
    """Whether its descriptor will call: what has happened is dealt with first, a little at a time."""
    for _ in range(ARM_ATTEMPTS):
        if progress.arm():
            return True
        if progress.progress():
            return False
    return False
