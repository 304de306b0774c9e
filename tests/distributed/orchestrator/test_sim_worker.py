"""The benchmarks' simulated worker keeps the control protocol: tokens in order, one end for each request."""

from __future__ import annotations

import asyncio

import pytest

from anabranch_client import Sampling
from benchmarks.sim_worker import Rates, SimWorker

pytestmark = pytest.mark.distributed

RATES = Rates(step_s=0.001, prefill_tokens_per_s=1e6, max_running=2)


def test_answers_are_whole_and_those_who_leave_make_room(play, wait):
    async def scenario(world):
        worker = SimWorker(world.orchestrator.control_endpoint, "sim-0", RATES)
        run = asyncio.create_task(worker.run())
        await wait(lambda: world.orchestrator.membership.serving)
        calls = [world.client.complete("abc", Sampling(max_tokens=number)) for number in (1, 5, 9, 300)]
        answers = await asyncio.gather(*calls)
        assert [answer.text for answer in answers] == ["a" * number for number in (1, 5, 9, 300)]
        assert {answer.finish_reason for answer in answers} == {"length"}
        async with world.client.generate("abc", Sampling(max_tokens=1000)) as stream:
            await anext(stream)
            await anext(stream)
        await wait(lambda: not worker._running and not worker._waiting)
        await world.quiet()
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)

    play(scenario)
