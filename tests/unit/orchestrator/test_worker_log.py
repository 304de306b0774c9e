"""The log of what happens to workers, and who follows it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from anabranch.errors import InvalidRequest
from orchestrator.worker_log import MAX_EVENTS, MAX_FOLLOWERS, MAX_REASON_CHARS, WorkerLog
from tests.unit.orchestrator.test_router import member

pytestmark = pytest.mark.unit

INFO = member("a", "decode").info


def test_events_are_followed_from_any_number_and_as_they_come():
    async def scenario():
        log = WorkerLog()
        log.add(INFO, "came")
        log.add(INFO, "gone", "x" * 5000)

        async def read(first: int) -> list[tuple[int, str]]:
            async with aclosing(log.follow(first)) as events:
                return [(event.sequence, event.change) async for _, event in events]

        tasks = [asyncio.create_task(read(first)) for first in (0, 1, 2, 3)]
        await asyncio.sleep(0)
        log.add(INFO, "fenced")
        await asyncio.sleep(0)
        log.close()
        whole = [(1, "came"), (2, "gone"), (3, "fenced")]
        assert await asyncio.gather(*tasks) == [whole, whole, whole[1:], whole[2:]]
        assert len(log._events[1].reason) == MAX_REASON_CHARS
        assert not log._followers

    asyncio.run(scenario())


def test_what_is_no_longer_kept_is_told():
    async def scenario():
        log = WorkerLog()
        log.add(INFO, "came")
        async with aclosing(log.follow(1)) as events:
            assert (await anext(events))[1].sequence == 1
            for _ in range(MAX_EVENTS + 5):
                log.add(INFO, "suspect")
            num_missed, event = await anext(events)
            assert (num_missed, event.sequence) == (5, 7)
            num_missed, event = await anext(events)
            assert (num_missed, event.sequence) == (0, 8)
        async with aclosing(log.follow(0)) as events:
            num_missed, event = await anext(events)
            assert (num_missed, event.sequence) == (0, 7)
        assert len(log._events) == MAX_EVENTS

    asyncio.run(scenario())


def test_bad_numbers_and_too_many_followers_are_refused():
    async def scenario():
        log = WorkerLog()
        for first in (-1, 2):
            with pytest.raises(
                InvalidRequest, match=f"first: {first}: give 0 to 1; an orchestrator that started again"
            ):
                await anext(log.follow(first))
        followers = [log.follow(0) for _ in range(MAX_FOLLOWERS)]
        tasks = [asyncio.create_task(anext(events, None)) for events in followers]
        await asyncio.sleep(0)
        with pytest.raises(InvalidRequest, match=f"first: {MAX_FOLLOWERS} follow already"):
            await anext(log.follow(0))
        log.close()
        assert await asyncio.gather(*tasks) == [None] * MAX_FOLLOWERS

    asyncio.run(scenario())
