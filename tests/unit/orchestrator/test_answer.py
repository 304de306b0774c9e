"""The bounded way from a worker's pace to a client's."""

from __future__ import annotations

import asyncio

import pytest

from anabranch.errors import Overloaded, WorkerDied
from anabranch.request.token import TokenLogprob
from orchestrator.answer import MAX_CHUNK_TOKENS, Answer, Chunk, Finished, Timings

pytestmark = pytest.mark.unit

END = Finished(
    finish_reason="stop",
    num_prompt_tokens=1,
    num_output_tokens=1,
    num_cached_tokens=0,
    timings=Timings(queue_s=0, prefill_s=0, kv_stream_s=0, ttft_s=0, tpot_s=0, e2e_s=0),
    route=(),
    kv=None,
)


def chunk(first: int, *token_ids: int, text: str = "") -> Chunk:
    logprobs = tuple(TokenLogprob(logprob=-float(token_id)) for token_id in token_ids)
    return Chunk(first_index=first, token_ids=token_ids, text=text, logprobs=logprobs)


def test_what_waits_together_leaves_together_and_the_end_comes_last():
    async def main() -> None:
        answer = Answer(100)
        answer.add(chunk(0, 5, text="a"))
        answer.add(chunk(1, 6, 7, text="b"))
        answer.add(chunk(3, text="rest"))
        answer.finish(END)
        assert await answer.next() == chunk(0, 5, 6, 7, text="abrest")
        assert await answer.next() is END
        assert await answer.next() is END

    asyncio.run(main())


def test_next_waits_for_what_comes():
    async def main() -> None:
        answer = Answer(100)
        waiting = asyncio.create_task(answer.next())
        await asyncio.sleep(0)
        assert not waiting.done()
        answer.add(chunk(0, 5))
        assert await waiting == chunk(0, 5)
        waiting = asyncio.create_task(answer.next())
        await asyncio.sleep(0)
        answer.fail(WorkerDied("gone"))
        with pytest.raises(WorkerDied, match="gone"):
            await waiting

    asyncio.run(main())


def test_an_error_comes_after_the_tokens_before_it():
    async def main() -> None:
        answer = Answer(100)
        answer.add(chunk(0, 5))
        answer.fail(WorkerDied("gone"))
        assert await answer.next() == chunk(0, 5)
        with pytest.raises(WorkerDied):
            await answer.next()

    asyncio.run(main())


def test_chunks_are_of_limited_size():
    async def main() -> None:
        answer = Answer(10_000)
        for index in range(1200):
            answer.add(chunk(index, index))
        sizes, indexes = [], []
        for _ in range(3):
            part = await answer.next()
            sizes.append(len(part.token_ids))
            indexes += part.token_ids
        assert sizes == [MAX_CHUNK_TOKENS, MAX_CHUNK_TOKENS, 1200 - 2 * MAX_CHUNK_TOKENS]
        assert indexes == list(range(1200))

    asyncio.run(main())


def test_unread_tokens_are_bounded_and_reading_makes_room():
    async def main() -> None:
        answer = Answer(3)
        answer.add(chunk(0, 1, 2, 3))
        await answer.next()
        answer.add(chunk(3, 4, 5, 6))
        with pytest.raises(Overloaded, match="max_unread_tokens: the client has left 4 tokens unread"):
            answer.add(chunk(6, 7))

    asyncio.run(main())


def test_an_answer_ends_once():
    answer = Answer(3)
    answer.finish(END)
    with pytest.raises(AssertionError):
        answer.fail(WorkerDied("gone"))
    with pytest.raises(AssertionError):
        answer.add(chunk(0, 1))
