"""Workers that die, fall silent, hang, lose each other or come back: their requests go on elsewhere."""

from __future__ import annotations

import asyncio
import re

import pytest

from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import Cancel, Failing, Generate, Prefill, Registered, Reserve
from anabranch.protocol.workers import Tokens as WorkerTokens
from anabranch.request.token import Token, TokenLogprob
from anabranch_client import InvalidRequest, NoWorkers, Overloaded, Sampling, WorkerDied
from tests.support.waiting import eventually_async

pytestmark = pytest.mark.distributed


async def die(world, worker, how):
    """End a worker as `how` says."""
    if how == "connection":
        await worker.close()
    elif how == "silence":
        worker.fall_silent()
    elif how == "last words":
        await worker.send(Failing(error=WireError(code="worker_died", message="step_stall_s: it hangs")))
    else:
        with world.admin() as admin:
            assert await asyncio.to_thread(admin.report_exit, worker.info.name, worker.info.pid, "killed by SIGKILL")


REASONS = {
    "connection": "connection is gone",
    "silence": "silent for",
    "report": "killed by SIGKILL",
    "last words": "step_stall_s: it hangs",
}


@pytest.mark.parametrize("how", list(REASONS))
@pytest.mark.parametrize(
    ("stage", "victim"),
    [("reserving", "decode"), ("prefilling", "prefill"), ("prefilling", "decode"), ("decoding", "decode")],
)
def test_a_worker_dies_at_each_stage_and_the_request_goes_on(play, to_prefilling, stage, victim, how):
    async def scenario(world):
        prefill, decode = await world.pair()
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=3, temperature=1.0)))
        if stage == "reserving":
            request = (await decode.expect(Reserve)).request
        else:
            request = await to_prefilling(world, prefill, decode)
        if stage == "decoding":
            await decode.tokens(request, "x", 0)
        other = await world.worker(f"{victim}-1", victim)
        dead, living = (prefill, decode) if victim == "prefill" else (decode, prefill)
        await die(world, dead, how)
        if stage != "reserving":
            assert (await living.expect(Cancel)).epoch == 0
        prefill, decode = (other, decode) if victim == "prefill" else (prefill, other)
        again = await to_prefilling(world, prefill, decode)
        assert (again.request_id, again.epoch, again.sampling) == (request.request_id, 1, request.sampling)
        known = b"x" if stage == "decoding" else b""
        assert bytes(again.output_ids) == known
        await prefill.prefill_ended(again)
        await decode.tokens(again, b"xyz"[len(known) :], len(known))
        await decode.ended(again, "length")
        done = await answer
        assert (done.text, done.usage.num_output_tokens, done.num_recoveries) == ("xyz", 3, 1)
        first, last = done.routes
        assert (first.workers, first.num_tokens, first.left) == (("prefill-0", "decode-0"), len(known), "worker_died")
        assert (last.workers, last.num_tokens, last.left) == (done.route, 3 - len(known), "")
        assert done.timings.recovery_s > 0.0
        (gone,) = (event for event in events(world) if event.change == "gone")
        assert gone.worker == dead.info.name
        assert REASONS[how] in gone.reason

    play(scenario)


def events(world):
    return list(world.orchestrator.membership.log._events)


def test_the_last_of_a_role_dies_and_requests_wait_for_another_to_come(play, to_prefilling):
    async def scenario(world):
        prefill, decode = await world.pair()
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=2)))
        request = await to_prefilling(world, prefill, decode)
        await decode.tokens(request, "a", 0)
        await decode.close()
        await prefill.expect(Cancel)
        with pytest.raises(NoWorkers):
            await world.client.complete("abc")
        decode = await world.worker("decode-0", "decode", pid=77)
        again = await to_prefilling(world, prefill, decode)
        await prefill.prefill_ended(again)
        await decode.tokens(again, "b", 1)
        await decode.ended(again, "length")
        assert (await answer).text == "ab"
        # The next time nobody comes.
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=2)))
        await to_prefilling(world, prefill, decode)
        world.orchestrator._dispatcher.queue._absence._grace_s = 0.1
        await decode.close()
        with pytest.raises(NoWorkers, match="no_worker_grace_s"):
            await answer

    play(scenario)


def test_without_recoveries_a_request_ends_with_what_failed_it(play, to_prefilling):
    async def scenario(world):
        prefill, decode = await world.pair()
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=9)))
        await to_prefilling(world, prefill, decode)
        await decode.close()
        with pytest.raises(WorkerDied, match=r"worker decode-0 .pid \d+. died: its control connection is gone"):
            await answer
        assert (await prefill.expect(Cancel)).epoch == 0

    play(scenario, max_recoveries=0)


def test_a_prefill_worker_that_dies_after_the_first_token_is_not_missed(play, to_prefilling):
    async def scenario(world):
        prefill, decode = await world.pair()
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=3)))
        request = await to_prefilling(world, prefill, decode)
        await decode.tokens(request, "a", 0)
        await prefill.close()
        await decode.tokens(request, "bc", 1)
        await decode.ended(request, "length")
        done = await answer
        assert (done.text, done.kv) == ("abc", None)

    play(scenario, report_timeout_s=5.0)


def test_others_go_on(play):
    async def scenario(world):
        workers = [await world.worker(f"both-{n}", "colocated") for n in range(2)]
        answers = [asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=4))) for _ in range(4)]
        held = {worker.info.name: [(await worker.expect(Generate)).request for _ in range(2)] for worker in workers}
        for worker in workers:
            for request in held[worker.info.name]:
                await worker.tokens(request, "ab", 0)
        await workers[0].close()
        moved = [(await workers[1].expect(Generate)).request for _ in range(2)]
        assert {request.request_id for request in moved} == {request.request_id for request in held["both-0"]}
        for request in held["both-1"] + moved:
            await workers[1].tokens(request, "cd", 2)
            await workers[1].ended(request, "length")
        results = await asyncio.gather(*answers)
        assert [result.text for result in results] == ["abcd"] * 4
        assert sorted(result.num_recoveries for result in results) == [0, 0, 1, 1]
        assert await world.client.health() == "serving"

    play(scenario)


@pytest.mark.parametrize("who", ["prefill", "decode"])
def test_a_lost_peer_is_left_at_once_whether_it_died_or_not(play, to_prefilling, who):
    async def scenario(world):
        prefill, decode = await world.pair()
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
        request = await to_prefilling(world, prefill, decode)
        others = await world.worker("prefill-1", "prefill"), await world.worker("decode-1", "decode")
        lost = WireError(code="peer_lost", message="it hung up")
        # Nothing says that the other one died, and nobody waits for it to show.
        if who == "prefill":
            await prefill.prefill_ended(request, lost)
            await decode.expect(Cancel)
        else:
            await decode.ended(request, "failed", lost)
            await prefill.expect(Cancel)
        again = await to_prefilling(world, *others)
        await others[0].prefill_ended(again)
        await others[1].tokens(again, "a", 0)
        await others[1].ended(again, "length")
        assert [route.left for route in (await answer).routes] == ["peer_lost", ""]

    play(scenario, worker_timeout_s=3600.0)


@pytest.mark.parametrize("code", ["checksum_mismatch", "stale_lease", "internal", "something_new", "deadline_exceeded"])
def test_what_a_worker_fails_at_is_tried_again(play, to_prefilling, code):
    async def scenario(world):
        prefill, decode = await world.pair()
        for who in ("prefill", "decode"):
            answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
            request = await to_prefilling(world, prefill, decode)
            error = WireError(code=code, message="slice 3 is bad")
            if who == "prefill":
                await prefill.prefill_ended(request, error)
                await decode.expect(Cancel)
            else:
                await decode.ended(request, "failed", error)
                await prefill.expect(Cancel)
            # There are no others: those that failed it are better than none.
            again = await to_prefilling(world, prefill, decode)
            await prefill.prefill_ended(again)
            await decode.tokens(again, "a", 0)
            await decode.ended(again, "length")
            done = await answer
            assert done.num_recoveries == 1
            assert done.routes[0].left == ("internal" if code == "something_new" else code)

    play(scenario)


@pytest.mark.parametrize(("code", "error"), [("invalid_request", InvalidRequest), ("out_of_blocks", Overloaded)])
def test_what_every_worker_would_say_ends_the_request(play, to_prefilling, code, error):
    async def scenario(world):
        prefill, decode = await world.pair()
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
        request = await to_prefilling(world, prefill, decode)
        await decode.ended(request, "failed", WireError(code=code, message="too much of it"))
        await prefill.expect(Cancel)
        with pytest.raises(error, match="too much of it"):
            await answer
        assert [member.num_failed for member in world.orchestrator.membership.members] == [0, 0]

    play(scenario)


@pytest.mark.parametrize("last", ["length", "stop", "stop string"])
def test_a_worker_that_dies_before_it_says_that_the_answer_is_whole(play, last):
    """There is nothing left to compute, and one that computed it would say too much."""

    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        sampling = Sampling(max_tokens=3 if last == "length" else 9, stop=["c"] if last == "stop string" else [])
        answer = asyncio.create_task(world.client.complete("abc", sampling))
        request = (await worker.expect(Generate)).request
        await worker.tokens(request, [97, 98, 0] if last == "stop" else "abc", 0)
        if last == "stop string":
            await worker.expect(Cancel)
        await worker.close()
        done = await answer
        assert (done.text, done.usage.num_output_tokens) == ("abc" if last == "length" else "ab", 3)
        assert (done.finish_reason, done.num_recoveries) == ("length" if last == "length" else "stop", 0)

    play(scenario)


def test_tokens_before_a_gap_reach_the_client_and_the_rest_comes_from_another(play):
    async def scenario(world):
        bad, good = await world.worker("both-0", "colocated"), await world.worker("both-1", "colocated")
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=4, logprobs=1, stop=["bcX"])))
        request = (await bad.expect(Generate)).request
        logprob = TokenLogprob(logprob=-1.0, top=((97, -1.0),))
        key = {"request_id": request.request_id, "epoch": 0}
        step = tuple(Token(**key, index=index, token_id=97 + index, logprob=logprob) for index in (0, 2))
        await bad.send(WorkerTokens(tokens=step))
        assert (await bad.expect(Cancel)).epoch == 0
        again = (await good.expect(Generate)).request
        assert bytes(again.output_ids) == b"a"
        await bad.tokens(request, "zzz", 1)
        await good.tokens(again, "bcd", 1, TokenLogprob(logprob=-2.0, top=((98, -2.0),)))
        await good.ended(again, "length")
        done = await answer
        # "bc" was held for the stop string.
        assert (done.text, done.token_ids) == ("abcd", tuple(b"abcd"))
        assert [item.logprob for item in done.logprobs] == [-1.0, -2.0, -2.0, -2.0]
        assert done.routes[0].left == "malformed_message"

    play(scenario)


def test_a_restarted_worker_takes_its_name_again_and_the_old_one_is_fenced(play):
    async def scenario(world):
        old = await world.worker("both-0", "colocated")
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=2)))
        request = (await old.expect(Generate)).request
        await old.tokens(request, "x", 0)
        old.fall_silent()
        await eventually_async(lambda: not world.orchestrator.membership.members)
        new = await world.worker("both-0", "colocated", pid=4242)
        # It is another one, though it has the name of one that failed the request.
        fresh = (await new.expect(Generate)).request
        assert (fresh.epoch, bytes(fresh.output_ids)) == (1, b"x")
        # The old process wakes up and goes on with what it had: it is told to end, and nothing of it is heard.
        await old.tokens(request, "!", 1)
        await old.tokens(fresh, "!", 1)
        fenced = await old.expect(Registered)
        assert fenced.error.code == "worker_died"
        assert "counts as dead (worker both-0" in fenced.error.message
        await new.tokens(fresh, "y", 1)
        await new.ended(fresh, "length")
        assert (await answer).text == "xy"
        assert [(event.change, event.pid) for event in events(world)] == [
            ("came", old.info.pid),
            ("gone", old.info.pid),
            ("came", 4242),
            ("fenced", old.info.pid),
        ]

    play(scenario)


def test_a_step_that_hangs_fences_its_worker_however_well_it_beats(play):
    async def scenario(world):
        hung = await world.worker("both-0", "colocated", step_stall_s=5.0)
        well = await world.worker("both-1", "colocated", step_stall_s=5.0)
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
        await hung.expect(Generate)
        await hung.beat(work_age_s=5.0)
        await well.beat(work_age_s=4.0)
        await hung.beat(work_age_s=5.1)
        request = (await well.expect(Generate)).request
        await well.tokens(request, "a", 0)
        await well.ended(request, "length")
        assert (await answer).num_recoveries == 1
        says = "step_stall_s: it beats, but has been at one thing for 5.1 s, longer than 5 s"
        assert events(world)[-1].reason.startswith(says)

    play(scenario)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("step_stall_s", 1.0, r"step_stall_s: 1.0: of both-0 must be above .* worker_timeout_s \(1 s\); raise"),
        ("heartbeat_s", 0.6, r"heartbeat_s: 0.6: of both-0 must be at most half of .*worker_timeout_s \(1 s\); lower"),
    ],
)
def test_a_worker_whose_timeouts_are_out_of_order_is_refused(play, field, value, says):
    async def scenario(world):
        stranger = world.stranger("both-0", "colocated", **{field: value})
        answer = await stranger.register()
        assert re.search(says, answer.error.message), answer.error

    play(scenario)


def test_a_worker_may_die_while_nobody_asks_anything_of_it(play, wait):
    async def scenario(world):
        prefill, decode = await world.pair()
        assert await world.client.health() == "serving"
        await prefill.close()
        await wait(lambda: len(world.orchestrator.membership.members) == 1)
        with world.admin() as admin:
            cluster = await asyncio.to_thread(admin.cluster)
        assert [worker.name for worker in cluster.workers] == ["decode-0"]
        (gone,) = cluster.departures
        assert (gone.name, gone.pid, gone.expected) == ("prefill-0", prefill.info.pid, False)
        assert "connection" in gone.reason
        assert not cluster.serving
        # Requests are refused until a prefill worker comes.
        with pytest.raises(NoWorkers, match="no prefill worker takes requests"):
            await world.client.complete("abc")
        prefill = await world.worker("prefill-1", "prefill")
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
        request = (await decode.expect(Reserve)).request
        await decode.reserved(request)
        await prefill.expect(Prefill)
        await decode.tokens(request, "k", 0)
        await prefill.prefill_ended(request)
        await decode.ended(request, "length")
        assert (await answer).route == ("prefill-1", "decode-0")

    play(scenario)
