"""Workers that die, fall silent, lose each other or come back: their requests end with a name, others go on."""

from __future__ import annotations

import asyncio

import pytest

from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import Cancel, Failing, Generate, Prefill, Registered, Reserve
from anabranch_client import NoWorkers, Sampling, Unavailable, WorkerDied

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
def test_a_worker_dies_at_each_stage(play, to_prefilling, stage, victim, how):
    async def scenario(world):
        prefill, decode = await world.pair()
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=9)))
        if stage == "reserving":
            await decode.expect(Reserve)
        else:
            request = await to_prefilling(world, prefill, decode)
        if stage == "decoding":
            await decode.tokens(request, "a", 0)
        dead, living = (prefill, decode) if victim == "prefill" else (decode, prefill)
        await die(world, dead, how)
        with pytest.raises(WorkerDied, match=f"worker {dead.info.name} .pid {dead.info.pid}. died.*{REASONS[how]}"):
            await answer
        if stage != "reserving":
            assert (await living.expect(Cancel)).request_id == request.request_id
        await world.quiet()
        assert await world.client.health() == "not_serving"

    play(scenario)


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
        for request in held["both-1"]:
            await workers[1].tokens(request, "cd", 2)
            await workers[1].ended(request, "length")
        results = await asyncio.gather(*answers, return_exceptions=True)
        died = [result for result in results if isinstance(result, WorkerDied)]
        assert len(died) == 2
        assert all("both-0" in str(error) for error in died)
        assert sorted(result.text for result in results if not isinstance(result, WorkerDied)) == ["abcd", "abcd"]
        assert await world.client.health() == "serving"

    play(scenario)


def test_a_peer_that_is_lost_because_it_died_is_named(play, to_prefilling):
    async def scenario(world):
        prefill, decode = await world.pair()
        answer = asyncio.create_task(world.client.complete("abc"))
        request = await to_prefilling(world, prefill, decode)
        decode.fall_silent()
        await prefill.prefill_ended(request, WireError(code="peer_lost", message="decode-0 hung up"))
        with pytest.raises(WorkerDied, match=r"worker decode-0 .* died"):
            await answer

    play(scenario)


def test_a_peer_that_is_lost_and_lives_is_what_is_said(play, to_prefilling):
    async def scenario(world):
        prefill, decode = await world.pair()
        answer = asyncio.create_task(world.client.complete("abc"))
        request = await to_prefilling(world, prefill, decode)
        await prefill.prefill_ended(request, WireError(code="peer_lost", message="decode-0 hung up"))
        await decode.expect(Cancel)
        with pytest.raises(Unavailable, match="decode-0 hung up") as caught:
            await answer
        assert caught.value.code == "peer_lost"

    play(scenario)


@pytest.mark.parametrize("code", ["checksum_mismatch", "stale_lease", "internal", "something_new"])
def test_a_workers_failure_reaches_the_client(play, to_prefilling, code):
    async def scenario(world):
        prefill, decode = await world.pair()
        for who in ("prefill", "decode"):
            answer = asyncio.create_task(world.client.complete("abc"))
            request = await to_prefilling(world, prefill, decode)
            error = WireError(code=code, message="slice 3 is bad")
            if who == "prefill":
                await prefill.prefill_ended(request, error)
                await decode.expect(Cancel)
            else:
                await decode.ended(request, "failed", error)
                await prefill.expect(Cancel)
            with pytest.raises(Exception, match="slice 3 is bad") as caught:
                await answer
            assert caught.value.code == ("internal" if code == "something_new" else code)

    play(scenario)


def test_a_restarted_worker_takes_its_name_again_and_the_old_one_is_fenced(play):
    async def scenario(world):
        old = await world.worker("both-0", "colocated")
        old.fall_silent()
        answer = asyncio.create_task(world.client.complete("abc"))
        request = (await old.expect(Generate)).request
        with pytest.raises(WorkerDied):
            await answer
        await old.expect(Cancel) if old.received else None
        new = await world.worker("both-0", "colocated", pid=4242)
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1), request_id="again"))
        fresh = (await new.expect(Generate)).request
        # The old process wakes up and goes on with what it had: it is told to end, and nothing of it is heard.
        await old.tokens(request, "x", 0)
        await old.tokens(fresh, "x", 0)
        fenced = await old.expect(Registered)
        assert fenced.error.code == "worker_died"
        await new.tokens(fresh, "y", 0)
        await new.ended(fresh, "length")
        assert (await answer).text == "y"

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
