"""Keeps a thread that loads experts from holding up the one that computes with others."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

# The longest rest after one expert, so that a new order is not waited for.
MAX_REST_S = 0.1
# How soon a thread that computes gets the interpreter back from one that loads; Python's own is ten times that.
SWITCH_S = 0.0005


def share_interpreter() -> None:
    """Let threads of this process take turns often: a product's calls each need the interpreter for a moment."""
    sys.setswitchinterval(SWITCH_S)


class Throttle:
    """Rests between two experts for as long as the last one took, where anything was computed meanwhile.

    Where nothing is, rows may be waiting for what is being loaded.

    Args:
        num_products: so many have been computed.
    """

    def __init__(
        self,
        num_products: Callable[[], int],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._num_products = num_products
        self._clock = clock
        self._sleep = sleep
        self._began_s = 0.0
        self._num_before = 0

    def begin(self) -> None:
        """Experts are loaded from now on, with `rest` between them."""
        self._began_s, self._num_before = self._clock(), self._num_products()

    def rest(self) -> None:
        """One expert is loaded, and another one is due."""
        if self._num_products() != self._num_before:
            self._sleep(min(self._clock() - self._began_s, MAX_REST_S))
        self.begin()
