"""A client's id names nothing inside: it may come again, at once or later, and no life hears of another."""

from __future__ import annotations

import asyncio
import logging

import pytest

from anabranch.protocol.workers import Cancel, Generate, Prefill, Reserve
from anabranch_client import Sampling

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("late", ["tokens", "ended"])
def test_an_id_that_was_cancelled_may_come_again_at_once(play, late):
    """What the worker still says of the first life is not heard by the second."""

    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        stream = world.client.generate("abc", Sampling(max_tokens=9), request_id="x")
        first = (await worker.expect(Generate)).request
        await worker.tokens(first, "ab", 0)
        for _ in range(2):
            await anext(stream)
        await stream.aclose()
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=3), request_id="x"))
        assert await worker.expect(Cancel) == Cancel(request_id=first.request_id, epoch=0)
        second = (await worker.expect(Generate)).request
        assert second.request_id != first.request_id
        assert "x" not in (first.request_id, second.request_id)
        if late == "tokens":
            await worker.tokens(first, "cd", 2)
        await worker.ended(first, "cancelled")
        await worker.tokens(second, "uvw", 0)
        await worker.ended(second, "length")
        done = await answer
        assert (done.text, done.request_id) == ("uvw", "x")

    play(scenario)


def test_on_a_pair_too(play, to_prefilling):
    async def scenario(world):
        prefill, decode = await world.pair()
        for _ in range(3):
            stream = world.client.generate("abc", Sampling(max_tokens=9), request_id="x")
            first = await to_prefilling(world, prefill, decode)
            await anext(stream)
            await stream.aclose()
            answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=2), request_id="x"))
            await decode.expect(Cancel)
            await prefill.expect(Cancel)
            second = (await decode.expect(Reserve)).request
            await decode.reserved(second)
            # The first life's workers say their last words only now.
            await decode.tokens(first, "a", 0)
            await prefill.prefill_ended(first)
            await decode.ended(first, "cancelled")
            await prefill.expect(Prefill)
            await prefill.prefill_ended(second)
            await decode.tokens(second, "uv", 0)
            await decode.ended(second, "length")
            assert (await answer).text == "uv"

    play(scenario)


def test_an_id_may_be_in_flight_twice(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        answers = [
            asyncio.create_task(world.client.complete(text, Sampling(max_tokens=1), request_id="mine"))
            for text in ("a", "b", "c")
        ]
        requests = [(await worker.expect(Generate)).request for _ in answers]
        assert len({request.request_id for request in requests}) == 3
        for request in reversed(requests):
            await worker.tokens(request, bytes(request.prompt_ids).upper(), 0)
            await worker.ended(request, "length")
        done = [await answer for answer in answers]
        assert [(one.text, one.request_id) for one in done] == [("A", "mine"), ("B", "mine"), ("C", "mine")]

    play(scenario)


def test_without_an_id_the_client_gets_the_drawn_one(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
        request = (await worker.expect(Generate)).request
        await worker.tokens(request, "k", 0)
        await worker.ended(request, "length")
        assert (await answer).request_id == request.request_id

    play(scenario)


def test_the_log_has_both_ids(play, caplog):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        stream = world.client.generate("abc", request_id="mine")
        request = (await worker.expect(Generate)).request
        await stream.aclose()
        await worker.expect(Cancel)
        await world.quiet()
        assert f"request {request.request_id} (mine) ended in prefilling" in caplog.text

    caplog.set_level(logging.INFO, "orchestrator.lifecycle")
    play(scenario)
