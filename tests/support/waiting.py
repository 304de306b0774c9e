"""Waiting for a condition, never for a time."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import Callable

# Every wait of the tests is this long, and longer in proportion where the machine is said to be slower.
WAIT_S = 60.0 * float(os.environ.get("ANABRANCH_TEST_SCALE", "1"))


def eventually(condition: Callable[[], object], what: str = "the condition", within_s: float = WAIT_S) -> None:
    """Poll until `condition` holds; fails with `what` where it does not in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_s} s"
        time.sleep(0.002)


async def eventually_async(condition: Callable[[], object], within_s: float = WAIT_S) -> None:
    """The same in an event loop; `condition` may be a coroutine function."""
    async with asyncio.timeout(within_s):
        while True:
            holds = condition()
            if await holds if inspect.isawaitable(holds) else holds:
                return
            await asyncio.sleep(0.005)
