"""Prompts that wait for an encoder: what this process was held up for is not their waiting."""

from __future__ import annotations

import asyncio
import time

import pytest

from anabranch.errors import DeadlineExceeded
from anabranch.system.clock import MAX_GAP_S
from orchestrator.encoding.lane import Lane
from orchestrator.encoding.messages import EncodeText

pytestmark = pytest.mark.unit


class ByteEncoder:
    """What a lane needs of an encoder."""

    alive = True

    async def encode(self, request: EncodeText) -> list[int]:
        return list(request.text.encode())

    def disconnect(self) -> None:
        pass


def test_a_prompt_that_waits_while_the_process_stands_still_waits_on() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def start_encoder(name: str) -> ByteEncoder:
            await gate.wait()
            return ByteEncoder()

        lane = Lane("text", 1, start_encoder, max_queued_chars=100, queue_timeout_s=2 * MAX_GAP_S)  # type: ignore[arg-type]
        lane.start()
        asking = asyncio.create_task(lane.encode(EncodeText(text="a"), 1))
        await asyncio.sleep(0)
        time.sleep(4 * MAX_GAP_S)  # noqa: ASYNC251  # the subject
        for _ in range(10):
            await asyncio.sleep(0)
        gate.set()
        assert await asking == [97]
        for task in lane.tasks:
            task.cancel()
        await asyncio.gather(*lane.tasks, return_exceptions=True)

    asyncio.run(scenario())


def test_a_prompt_waits_no_longer_than_it_may() -> None:
    async def scenario() -> None:
        lane = Lane("text", 0, None, max_queued_chars=100, queue_timeout_s=0.05)  # type: ignore[arg-type]
        with pytest.raises(DeadlineExceeded, match=r"queue_timeout_s: .* within 0.05 s"):
            await lane.encode(EncodeText(text="a"), 1)

    asyncio.run(scenario())
