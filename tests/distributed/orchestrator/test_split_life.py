"""Requests that live: on a pair of workers, on a colocated one, given back, cut short by a stop string."""

from __future__ import annotations

import asyncio

import pytest

from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import Cancel, Generate, Preempted, Prefill, Reserve, Tokens
from anabranch.request.token import Token, TokenLogprob
from anabranch_client import ChatMessage, DeadlineExceeded, Finished, Overloaded, Sampling, Unavailable
from anabranch_client import Tokens as ClientTokens
from tests.support.waiting import eventually_async

pytestmark = pytest.mark.distributed


def test_a_request_on_a_pair(play, to_prefilling):
    async def scenario(world):
        prefill, decode = await world.pair()
        answer = asyncio.create_task(
            world.client.complete("hi you", Sampling(max_tokens=5, temperature=0.5, top_k=3), request_id="r-1")
        )
        request = await to_prefilling(world, prefill, decode)
        assert (request.epoch, bytes(request.prompt_ids)) == (0, b"hi you")
        assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.top_k) == (5, 0.5, 3)
        assert request.sampling.seed is not None
        await decode.tokens(request, "hello", 0)
        await prefill.prefill_ended(request)
        await decode.ended(request, "length")
        done = await answer
        assert (done.request_id, done.text, done.token_ids) == ("r-1", "hello", tuple(b"hello"))
        assert done.finish_reason == "length"
        assert (done.usage.num_prompt_tokens, done.usage.num_output_tokens, done.usage.num_cached_tokens) == (6, 5, 2)
        assert done.route == ("prefill-0", "decode-0")
        assert (done.kv.bytes, done.kv.transport) == (4096, "tcp")
        assert done.kv.overlap == pytest.approx(0.75)
        timings = done.timings
        assert timings.prefill_s == 0.5
        assert timings.kv_stream_s == pytest.approx(0.4)
        assert 0.25 < timings.queue_s < 0.25 + timings.e2e_s
        assert 0.0 < timings.ttft_s <= timings.e2e_s
        assert 0.0 < timings.tpot_s * 4 <= timings.e2e_s - timings.ttft_s
        assert decode.received == prefill.received == []

    play(scenario)


def test_a_greedy_request_gets_no_seed_and_the_rest_of_the_context(play, to_prefilling):
    async def scenario(world):
        prefill, decode = await world.pair()
        answer = asyncio.create_task(world.client.complete([1, 2, 3]))
        request = await to_prefilling(world, prefill, decode)
        assert request.sampling.seed is None
        assert request.sampling.max_tokens == 1024 - 3
        await prefill.prefill_ended(request)
        await decode.tokens(request, [97, 0], 0)
        await decode.ended(request, "stop")
        done = await answer
        assert (done.text, done.token_ids, done.finish_reason) == ("a", (97, 0), "stop")

    play(scenario)


def test_a_chat_on_a_colocated_worker(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        answer = asyncio.create_task(world.client.complete([ChatMessage("user", "hey")], Sampling(max_tokens=2)))
        request = (await worker.expect(Generate)).request
        assert bytes(request.prompt_ids) == b"user:hey\n"
        await worker.tokens(request, "ok", 0)
        await worker.ended(request, "length", queue_s=0.1, prefill_s=0.2, num_cached_tokens=4)
        done = await answer
        assert (done.text, done.route, done.kv) == ("ok", ("both-0",), None)
        assert done.usage.num_cached_tokens == 4
        assert done.timings.prefill_s == 0.2
        assert done.timings.queue_s > 0.1

    play(scenario)


def test_logprobs_reach_the_client(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        answer = asyncio.create_task(world.client.complete("x", Sampling(max_tokens=1, logprobs=2)))
        request = (await worker.expect(Generate)).request
        assert request.sampling.logprobs == 2
        await worker.tokens(request, "y", 0, TokenLogprob(logprob=-0.5, top=((121, -0.5), (97, -1.5))))
        await worker.ended(request, "length")
        (logprob,) = (await answer).logprobs
        assert (logprob.logprob, logprob.top) == (-0.5, ((121, -0.5), (97, -1.5)))

    play(scenario)


def test_a_preempted_request_goes_on_where_it_was(play, to_prefilling):
    async def scenario(world):
        prefill, decode = await world.pair()
        stream = world.client.generate("abc", Sampling(max_tokens=6, temperature=1.0))
        events = asyncio.create_task(collect(stream))
        first = await to_prefilling(world, prefill, decode)
        await prefill.prefill_ended(first)
        await decode.tokens(first, "xy", 0)
        await decode.ended(first, "preempted")
        second = await to_prefilling(world, prefill, decode)
        assert (second.request_id, second.epoch) == (first.request_id, 1)
        assert (second.prompt_ids, bytes(second.output_ids)) == (first.prompt_ids, b"xy")
        assert second.sampling == first.sampling
        # The old epoch is still talking, and the new one repeats what is known: neither is heard.
        await decode.tokens(first, "!!", 2)
        await decode.tokens(second, "?", 1)
        await decode.tokens(second, "zwvu", 2)
        await decode.ended(first, "length")
        await prefill.prefill_ended(second)
        await decode.ended(second, "length")
        tokens, finished = split(await events)
        assert [index for chunk in tokens for index in indexes(chunk)] == [0, 1, 2, 3, 4, 5]
        assert "".join(chunk.text for chunk in tokens) == "xyzwvu"
        assert finished.kv.bytes == 2 * 4096
        assert finished.timings.prefill_s == 1.0

    play(scenario)


def test_a_preempted_request_is_served_before_those_that_wait(play, to_prefilling, wait):
    async def scenario(world):
        prefill, decode = await world.pair()
        first = asyncio.create_task(world.client.complete("a" * 10, Sampling(max_tokens=2)))
        request = await to_prefilling(world, prefill, decode)
        second = asyncio.create_task(world.client.complete("b" * 10, Sampling(max_tokens=2)))
        await wait(lambda: len(world.orchestrator._dispatcher.queue) == 1)
        await decode.ended(request, "preempted")
        assert (await prefill.expect(Cancel)).epoch == 0
        for letter, epoch in ((b"a", 1), (b"b", 0)):
            request = await to_prefilling(world, prefill, decode)
            assert (bytes(request.prompt_ids[:1]), request.epoch) == (letter, epoch)
            await decode.tokens(request, "ok", 0)
            await prefill.prefill_ended(request)
            await decode.ended(request, "length")
        assert ((await first).text, (await second).text) == ("ok", "ok")

    play(scenario, prefill_ahead_tokens=10)


def test_a_worker_that_always_gives_back_ends_the_request(play, to_prefilling):
    async def scenario(world):
        prefill, decode = await world.pair()
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=2)))
        for _ in range(3):
            request = await to_prefilling(world, prefill, decode)
            await decode.ended(request, "preempted")
            await prefill.expect(Cancel)
        with pytest.raises(Overloaded, match="gave the request back 3 times") as caught:
            await answer
        assert caught.value.code == "out_of_blocks"

    play(scenario, max_retries=2)


@pytest.mark.parametrize("who", ["prefill", "decode"])
def test_a_draining_workers_request_goes_to_another(play, who):
    async def scenario(world):
        leaving = await world.worker("leaving", who)
        other = await world.worker("other", "decode" if who == "prefill" else "prefill")
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=2)))
        decode, prefill = (other, leaving) if who == "prefill" else (leaving, other)
        request = (await decode.expect(Reserve)).request
        no = WireError(code="draining", message="leaving")
        if who == "prefill":
            await decode.reserved(request)
            await prefill.expect(Prefill)
            await prefill.prefill_ended(request, no)
            await decode.expect(Cancel)
        else:
            await decode.ended(request, "failed", no)
        staying = await world.worker("staying", who)
        decode, prefill = (other, staying) if who == "prefill" else (staying, other)
        request = (await decode.expect(Reserve)).request
        assert request.epoch == 1
        await decode.reserved(request)
        await prefill.expect(Prefill)
        await decode.tokens(request, "ok", 0)
        await prefill.prefill_ended(request)
        await decode.ended(request, "length")
        assert (await answer).route == (prefill.info.name, decode.info.name)

    play(scenario)


def test_a_gap_in_the_tokens_ends_the_request(play, to_prefilling):
    async def scenario(world):
        prefill, decode = await world.pair()
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=9)))
        request = await to_prefilling(world, prefill, decode)
        await decode.tokens(request, "a", 0)
        await decode.tokens(request, "c", 2)
        with pytest.raises(Unavailable, match="decode-0 sent token 2 where 1 of at most 9 was due"):
            await answer
        assert (await decode.expect(Cancel)).request_id == request.request_id
        await prefill.expect(Cancel)

    play(scenario, max_recoveries=0)


@pytest.mark.parametrize(
    ("stop", "pieces", "text"),
    [
        (["END"], ["one E", "N", "D two"], "one "),
        (["END"], ["EEN", "ENDX"], "EEN"),
        (["\n\n", "zz"], ["a\n", "b", "z", "\n\n"], "a\nbz"),
        (["é!"], ["caf", "é", "!"], "caf"),
    ],
)
def test_a_stop_string_across_tokens(play, to_prefilling, stop, pieces, text):
    async def scenario(world):
        prefill, decode = await world.pair()
        stream = world.client.generate("abc", Sampling(max_tokens=100, stop=stop))
        events = asyncio.create_task(collect(stream))
        request = await to_prefilling(world, prefill, decode)
        await prefill.prefill_ended(request)
        sent = "".join(pieces).encode()
        await decode.tokens(request, sent, 0)
        assert (await decode.expect(Cancel)).epoch == 0
        await decode.ended(request, "cancelled")
        tokens, finished = split(await events)
        assert "".join(chunk.text for chunk in tokens) == text
        # The tokens of the stop string are reported: they were generated.
        num_needed = min(n for n in range(len(sent) + 1) if any(s in sent[:n].decode("utf-8", "replace") for s in stop))
        assert finished.usage.num_output_tokens == num_needed
        assert [index for chunk in tokens for index in indexes(chunk)] == list(range(num_needed))
        assert finished.finish_reason == "stop"
        assert finished.kv is not None

    play(scenario)


def test_a_stop_string_on_a_colocated_worker_still_brings_its_timings(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        answer = asyncio.create_task(world.client.complete("abc", Sampling(stop=["."])))
        request = (await worker.expect(Generate)).request
        await worker.tokens(request, "done.", 0)
        await worker.expect(Cancel)
        await worker.ended(request, "cancelled", queue_s=0.1, prefill_s=0.2)
        done = await answer
        assert (done.text, done.finish_reason, done.timings.prefill_s) == ("done", "stop", 0.2)

    play(scenario)


def test_text_held_for_a_stop_string_comes_at_the_end(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=3, stop=["ENDING"])))
        request = (await worker.expect(Generate)).request
        await worker.tokens(request, "END", 0)
        await worker.ended(request, "length")
        done = await answer
        assert (done.text, done.finish_reason) == ("END", "length")

    play(scenario)


def test_what_has_no_text_is_what_the_worker_stops_at(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        assert (await world.client.model()).eos_token_ids == (0,)
        for sampling, text, stop_token_ids in (
            (Sampling(stop_token_ids=[33]), "a", (33, 0)),
            (Sampling(stop_token_ids=[33, 0]), "a", (33, 0)),
            (Sampling(), "a!", (0,)),
            (Sampling(ignore_eos=True), "a!\x00", ()),
            (Sampling(ignore_eos=True, stop_token_ids=[33]), "a\x00", (33,)),
        ):
            answer = asyncio.create_task(world.client.complete("abc", sampling))
            request = (await worker.expect(Generate)).request
            assert request.sampling.stop_token_ids == frozenset(stop_token_ids)
            await worker.tokens(request, [97, 33, 0], 0)
            await worker.ended(request, "stop")
            done = await answer
            assert (done.text, done.token_ids) == (text, (97, 33, 0))

    play(scenario)


def test_prefills_report_may_come_after_the_answer_or_not_at_all(play, to_prefilling):
    async def scenario(world):
        prefill, decode = await world.pair()
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
        request = await to_prefilling(world, prefill, decode)
        await decode.tokens(request, "a", 0)
        await decode.ended(request, "length")
        await prefill.prefill_ended(request)
        assert (await answer).kv.bytes == 4096
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
        request = await to_prefilling(world, prefill, decode)
        await decode.tokens(request, "a", 0)
        await decode.ended(request, "length")
        assert (await prefill.expect(Cancel)).request_id == request.request_id
        done = await answer
        assert (done.text, done.kv, done.timings.prefill_s) == ("a", None, 0.0)

    play(scenario, report_timeout_s=0.2)


def test_many_requests_share_a_step(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        answers = [asyncio.create_task(world.client.complete(f"{n}", Sampling(max_tokens=20))) for n in range(8)]
        requests = [(await worker.expect(Generate)).request for _ in answers]
        for index in range(20):
            step = tuple(
                Token(request_id=r.request_id, epoch=0, index=index, token_id=97 + (index + r.prompt_ids[0]) % 26)
                for r in requests
            )
            await worker.send(Tokens(tokens=step))
        for request in requests:
            await worker.ended(request, "length")
        for number, answer in enumerate(answers):
            expected = "".join(chr(97 + (index + ord(str(number))) % 26) for index in range(20))
            assert (await answer).text == expected

    play(scenario)


@pytest.mark.parametrize(
    ("setting", "stage"),
    [
        ("queue_timeout_s", "queued"),
        ("reserve_timeout_s", "reserving"),
        ("prefill_timeout_s", "prefilling"),
        ("token_timeout_s", "decoding"),
        ("preempted_timeout_s", "preempted"),
    ],
)
def test_every_wait_has_a_named_deadline(play, to_prefilling, setting, stage):
    async def scenario(world):
        prefill, decode = await world.pair()
        if stage == "queued":
            first = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=9)))
            await decode.expect(Reserve)
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=9)))
        if stage == "reserving":
            await decode.expect(Reserve)
        elif stage in ("prefilling", "decoding", "preempted"):
            request = await to_prefilling(world, prefill, decode)
        if stage in ("decoding", "preempted"):
            await decode.tokens(request, "a", 0)
            await prefill.prefill_ended(request)
        if stage == "preempted":
            await decode.send(Preempted(request_id=request.request_id, epoch=request.epoch))
        with pytest.raises(DeadlineExceeded, match=f"{setting}: nothing for 0.3 s while {stage}"):
            await answer
        if stage == "queued":
            first.cancel()
        await decode.expect(Cancel)
        if stage == "prefilling":
            await prefill.expect(Cancel)

    play(scenario, prefill_ahead_tokens=1, max_recoveries=0, **{setting: 0.3})


@pytest.mark.parametrize(
    ("setting", "blamed"),
    [
        ("reserve_timeout_s", ("decode",)),
        ("prefill_timeout_s", ("prefill", "decode")),
        ("token_timeout_s", ("decode",)),
        ("preempted_timeout_s", ("decode",)),
    ],
)
def test_a_stage_that_takes_too_long_is_its_workers_failure(play, to_prefilling, setting, blamed):
    async def scenario(world):
        prefill, decode = await world.pair()
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=2)))
        if setting == "reserve_timeout_s":
            await decode.expect(Reserve)
        else:
            request = await to_prefilling(world, prefill, decode)
        tokens = b""
        if setting in ("token_timeout_s", "preempted_timeout_s"):
            await decode.tokens(request, "a", 0)
            await prefill.prefill_ended(request)
            tokens = b"a"
        if setting == "preempted_timeout_s":
            await decode.send(Preempted(request_id=request.request_id, epoch=request.epoch))
        others = {role: await world.worker(f"{role}-1", role) for role in ("prefill", "decode")}
        await decode.expect(Cancel)
        decode = others["decode"]
        if "prefill" in blamed:
            await prefill.expect(Cancel)
            prefill = others["prefill"]
        again = (await decode.expect(Reserve)).request
        assert (again.epoch, bytes(again.output_ids)) == (1, tokens)
        await decode.reserved(again)
        # One that is not to blame is as good as another.
        await wait_for_one_of(prefill, others["prefill"])
        prefill = prefill if prefill.received else others["prefill"]
        await prefill.expect(Prefill)
        await prefill.prefill_ended(again)
        await decode.tokens(again, b"ab"[len(tokens) :], len(tokens))
        await decode.ended(again, "length")
        done = await answer
        assert (done.text, [route.left for route in done.routes]) == ("ab", ["deadline_exceeded", ""])

    play(scenario, **{setting: 0.3})


async def wait_for_one_of(*workers):
    await eventually_async(lambda: any(worker.received for worker in workers))


def test_too_many_waiting_requests_are_refused_at_once(play, wait):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        waiting = [asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1))) for _ in range(3)]
        await wait(lambda: len(world.orchestrator._dispatcher.queue) == 2)
        with pytest.raises(Overloaded, match="3 requests wait for their first token, as many as max_queued") as caught:
            await world.client.complete("abc")
        assert caught.value.code == "overloaded"
        for _ in waiting:
            request = (await worker.expect(Generate)).request
            await worker.tokens(request, "k", 0)
            await worker.ended(request, "length")
        assert [(await answer).text for answer in waiting] == ["k"] * 3

    play(scenario, max_queued=3, prefill_ahead_tokens=1)


async def collect(stream):
    return [event async for event in stream]


def split(events):
    """Token events and the last one; the first is Accepted."""
    assert isinstance(events[-1], Finished)
    assert all(isinstance(event, ClientTokens) for event in events[1:-1])
    return events[1:-1], events[-1]


def indexes(chunk):
    return range(chunk.first_index, chunk.first_index + len(chunk.token_ids))
