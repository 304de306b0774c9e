"""How many FFN workers there shall be: operators ask, and who starts workers follows.

The orchestrator starts no process. `anabranch up` follows; without anybody who does, asking is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from anabranch.errors import InvalidRequest
from orchestrator.ffn_pool import FfnPool

MAX_WORKERS = 256
# Launchers that follow at a time; one is usual.
MAX_FOLLOWERS = 16


class FfnScale:
    """Belongs to one event loop."""

    def __init__(self, pool: FfnPool) -> None:
        self._pool = pool
        self._wanted = 0
        # What each that follows has room for, and what wakes it.
        self._followers: dict[asyncio.Event, int] = {}
        self._closed = False

    def ask(self, workers: int) -> None:
        """Tell who follows. Raises InvalidRequest, with the value and the remedy."""
        if not 1 <= workers <= MAX_WORKERS:
            raise InvalidRequest(f"{workers}: give 1 to {MAX_WORKERS}", "workers")
        if not self._pool.exists:
            raise InvalidRequest(
                "this cluster has no ffn workers; start one whose topology has attn and ffn pools", "workers"
            )
        if not self._followers:
            raise InvalidRequest(
                "nobody who starts workers follows; start `python -m ffn_nodes` by hand, or drain a worker", "workers"
            )
        room = max(self._followers.values())
        if workers > room:
            raise InvalidRequest(f"{workers}: the machine has memory for {room} ffn workers", "workers")
        self._pool.check_size(workers)
        self._wanted = workers
        for news in self._followers:
            news.set()

    async def follow(self, max_workers: int) -> AsyncGenerator[int, None]:
        """The number now (0: nobody has asked), and each later one; the newest alone, where several have come.

        Args:
            max_workers: most that who follows has room for.

        Raises:
            InvalidRequest: max_workers is none, or too many follow.
        """
        if not 1 <= max_workers <= MAX_WORKERS:
            raise InvalidRequest(f"{max_workers}: give 1 to {MAX_WORKERS}", "max_workers")
        if len(self._followers) >= MAX_FOLLOWERS:
            raise InvalidRequest(f"{MAX_FOLLOWERS} launchers follow already", "max_workers")
        news = asyncio.Event()
        self._followers[news] = max_workers
        try:
            while not self._closed:
                news.clear()
                yield self._wanted
                await news.wait()
        finally:
            del self._followers[news]

    def close(self) -> None:
        """Let nobody follow any longer."""
        self._closed = True
        for news in self._followers:
            news.set()
