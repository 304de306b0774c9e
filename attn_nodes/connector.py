"""Reaches FFN nodes on a thread of its own: one that is slow to answer holds up no lane."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass

from anabranch.engine.faults import Faults
from anabranch.protocol.ffn import FfnNode
from transport.m2n.base import Dialled, LinkMaker

MIN_PAUSE_S = 0.05
MAX_PAUSE_S = 2.0
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Connected:
    """A node that was reached."""

    node: FfnNode
    dialled: Dialled


class Connector:
    """Tries each node that it was given until it is reached, with longer and longer pauses."""

    def __init__(self, links: LinkMaker) -> None:
        self._links = links
        self._faults = Faults("reaching an FFN node")
        self._made: queue.SimpleQueue[Connected] = queue.SimpleQueue()
        self._changed = threading.Condition()
        # Nodes to try, by name, and when.
        self._wanted: dict[str, tuple[FfnNode, float, float]] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ffn-links", daemon=True)
        self._thread.start()

    def connect(self, node: FfnNode) -> None:
        """Reach a node; `take` gives what becomes a link."""
        with self._changed:
            self._wanted[node.name] = (node, 0.0, MIN_PAUSE_S)
            self._changed.notify()

    def forget(self, name: str) -> None:
        """Try a node no more; one that is reached just now is given all the same."""
        with self._changed:
            self._wanted.pop(name, None)

    def take(self) -> Connected | None:
        """A node that was reached; the caller closes those that it has no use for."""
        # Asked before every turn of a lane; one thread takes, so what is there stays.
        return None if self._made.empty() else self._made.get_nowait()

    def close(self) -> None:
        """End the thread, and close what nobody took."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(STOP_TIMEOUT_S)
        while (made := self.take()) is not None:
            made.dialled.close()

    def _run(self) -> None:
        while (node := self._next()) is not None:
            try:
                dialled = self._links.dial(node.addresses, node.name)
            except Exception as error:  # whatever it is: nobody else would try again
                self._faults.log(error)
                self._put_off(node)
            else:
                with self._changed:
                    if self._is_wanted(node):
                        del self._wanted[node.name]
                self._made.put(Connected(node, dialled))

    def _next(self) -> FfnNode | None:
        """The node to try now; waits until there is one. None: the end."""
        with self._changed:
            while not self._closing:
                now_s = time.monotonic()
                first = min(self._wanted.values(), key=lambda wanted: wanted[1], default=None)
                if first is not None and first[1] <= now_s:
                    return first[0]
                self._changed.wait(None if first is None else first[1] - now_s)
        return None

    def _put_off(self, node: FfnNode) -> None:
        with self._changed:
            if self._is_wanted(node):
                pause_s = self._wanted[node.name][2]
                again_s = time.monotonic() + pause_s
                self._wanted[node.name] = (node, again_s, min(2 * pause_s, MAX_PAUSE_S))

    def _is_wanted(self, node: FfnNode) -> bool:
        wanted = self._wanted.get(node.name)
        return wanted is not None and wanted[0] is node
