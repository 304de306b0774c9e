"""Many requests at once through workers that finish, preempt, fail, drain and die by chance: each ends once."""

from __future__ import annotations

import asyncio
import random

import pytest

from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import Cancel, Prefill, Reserve
from anabranch_client import ClientError, Finished, Sampling, Tokens

pytestmark = pytest.mark.distributed

NUM_REQUESTS = 120
LENGTH = 12


class LivelyWorker:
    """Plays its part of every request by chance; answers each attempt that it was given with one end."""

    def __init__(self, scripted, dice: random.Random) -> None:
        self.scripted = scripted
        self.dice = dice
        self.open: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._task = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            await self.scripted._news.wait()
            self.scripted._news.clear()
            while self.scripted.received:
                message = self.scripted.received.pop(0)
                if isinstance(message, Cancel):
                    task = self.open.get((message.request_id, message.epoch))
                    if task is not None:
                        task.cancel()
                elif isinstance(message, Reserve | Prefill):
                    key = message.request.key
                    assert key not in self.open, f"{key} is given twice"
                    play = self._decode if isinstance(message, Reserve) else self._prefill
                    self.open[key] = task = asyncio.create_task(play(message.request))
                    task.add_done_callback(lambda _, key=key: self.open.pop(key))

    async def _decode(self, request) -> None:
        worker, dice = self.scripted, self.dice
        await asyncio.sleep(dice.random() * 0.01)
        if dice.random() < 0.05:
            return await worker.ended(request, "failed", WireError(code="internal", message="no luck"))
        await worker.reserved(request)
        first = len(request.output_ids)
        for index in range(first, LENGTH):
            await asyncio.sleep(dice.random() * 0.004)
            if dice.random() < 0.02:
                return await worker.ended(request, "preempted")
            if dice.random() < 0.1 and index:
                await worker.tokens(request, [97 + index - 1], index - 1)
            await worker.tokens(request, [97 + index], index)
        return await worker.ended(request, "length")

    async def _prefill(self, request) -> None:
        await asyncio.sleep(self.dice.random() * 0.01)
        if self.dice.random() < 0.05:
            return await self.scripted.prefill_ended(request, WireError(code="checksum_mismatch", message="no luck"))
        return await self.scripted.prefill_ended(request)

    async def stop(self) -> None:
        self._task.cancel()
        for task in self.open.values():
            task.cancel()
        await self.scripted.close()


async def ask(world, number: int, dice: random.Random) -> str:
    """One client: reads to the end, or leaves after some events; checks what it sees."""
    await asyncio.sleep(dice.random() * 0.5)
    patience = dice.randrange(LENGTH) if dice.random() < 0.2 else None
    next_index = 0
    text = ""
    try:
        async with world.client.generate(f"request {number}", Sampling(max_tokens=LENGTH)) as stream:
            async for event in stream:
                if isinstance(event, Tokens):
                    assert event.first_index == next_index
                    next_index += len(event.token_ids)
                    text += event.text
                elif isinstance(event, Finished):
                    assert text == "".join(chr(97 + index) for index in range(LENGTH))
                    return "finished"
                if patience is not None and next_index >= patience:
                    return "left"
    except ClientError as error:
        return error.code
    raise AssertionError("the stream ended without an end")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_request_ends_once_and_nothing_is_left(play, wait, seed):
    async def scenario(world):
        dice = random.Random(seed)
        workers = [
            LivelyWorker(await world.worker(f"{role}-{n}", role), dice)
            for role in ("prefill", "decode")
            for n in range(2)
        ]
        asking = [asyncio.create_task(ask(world, number, dice)) for number in range(NUM_REQUESTS)]
        for name in ("decode-0", "prefill-1"):
            await asyncio.sleep(0.15)
            victim = next(worker for worker in workers if worker.scripted.info.name == name)
            await victim.stop()
            workers.remove(victim)
            await wait(lambda name=name: world.orchestrator.membership.by_name(name) is None)
            role = name.partition("-")[0]
            workers.append(LivelyWorker(await world.worker(name, role, pid=seed), dice))
        fates = await asyncio.gather(*asking)
        await world.quiet()
        # Whatever a living worker was given has ended there, by itself or by a Cancel.
        await wait(lambda: all(not worker.open for worker in workers))
        counts = {fate: fates.count(fate) for fate in set(fates)}
        # Four failures in a row are rare, and nothing else ends a request that its client waits for.
        assert set(counts) <= {"finished", "left", "recoveries_exhausted"}
        assert counts.get("recoveries_exhausted", 0) <= 2
        assert counts["finished"] > NUM_REQUESTS / 3
        assert world.orchestrator.num_requests == 0
        for worker in workers:
            await worker.stop()

    play(scenario, prefill_ahead_tokens=60)
