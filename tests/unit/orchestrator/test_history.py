"""How often a request may fail workers, which ones it keeps away from, and when it gets them for itself."""

from __future__ import annotations

import asyncio

import pytest

from anabranch.errors import OutOfBlocks, PeerLost, RecoveriesExhausted, WorkerDied
from orchestrator.attempt import PROVEN_TOKENS, Attempt
from orchestrator.history import MAX_ROUTES, History
from orchestrator.inbox import Inbox
from orchestrator.member import Member
from orchestrator.request_queue import RequestQueue
from orchestrator.router import LeastWork, Route
from orchestrator.worker_failure import WorkerFailure, death
from tests.unit.orchestrator.test_request_queue import Workers, again, queue_for, standing
from tests.unit.orchestrator.test_router import member, request

pytestmark = pytest.mark.unit


def history(max_recoveries: int = 3, max_given_back: int = 2) -> History:
    return History(max_recoveries=max_recoveries, max_given_back=max_given_back)


def attempt(num_tokens: int = 0, worker: Member | None = None) -> Attempt:
    made = Attempt(request(), Route(worker or member("c", "colocated")))
    made.brought(num_tokens)
    made.close()
    return made


def died(worker: Member) -> WorkerFailure:
    return death(worker, WorkerDied(f"worker {worker.name} died"))


def test_too_many_failures_in_a_row_end_the_request_with_the_names_of_its_workers():
    record = history()
    for number in range(3):
        record.failed(attempt(PROVEN_TOKENS - 1), died(member(f"c{number}", "colocated")))
    two = [member("p", "prefill"), member("d", "decode")]
    with pytest.raises(RecoveriesExhausted, match=r"max_recoveries: 4 times in a row .*c0: .*c2: .*p and d: lost"):
        record.failed(attempt(), WorkerFailure(PeerLost("lost"), two))
    assert record.num_recoveries == 3
    assert {worker.name for worker in record.avoid} == {"c0", "c1", "c2", "p", "d"}


def test_one_that_was_seen_to_go_well_begins_a_new_row():
    record = history()
    for number in range(20):
        well = number % 3 == 2
        record.failed(attempt(PROVEN_TOKENS * well), died(member(f"c{number}", "colocated")))
    assert record.num_recoveries == 20
    assert len(record.routes) == 20


def test_without_recoveries_the_failure_itself_ends_the_request():
    with pytest.raises(WorkerDied, match="worker c died"):
        history(0).failed(attempt(), died(member("c", "colocated")))


def test_what_is_given_back_is_counted_apart():
    record = history()
    for _ in range(2):
        record.given_back(attempt(), "preempted")
        record.failed(attempt(), died(member("c", "colocated")))
    with pytest.raises(OutOfBlocks, match="max_retries: workers gave the request back 3 times"):
        record.given_back(attempt(), "preempted")
    record = history()
    for _ in range(MAX_ROUTES + 5):
        record.given_back(attempt(1), "draining")
    assert len(record.routes) == MAX_ROUTES
    assert record.num_recoveries == 0


def test_the_last_chance_is_taken_alone():
    async def scenario():
        workers = [member("a", "colocated"), member("b", "colocated")]
        queue = queue_for(Workers(*workers))
        queue._router = LeastWork(1000)
        inboxes = {name: Inbox() for name in ("running", "doomed", "later", "last")}
        queue.put(request(request_id="running"), inboxes["running"], standing(), history())
        running = inboxes["running"].attempt
        doomed = history()
        for number in range(3):
            assert not doomed.alone
            doomed.failed(attempt(), died(member(f"c{number}", "colocated")))
        assert doomed.alone
        # One is free: it goes there, and is alone there until it has brought tokens.
        queue.put(request(request_id="doomed"), inboxes["doomed"], standing(), doomed)
        assert inboxes["doomed"].attempt.route.names == ("b",)
        for _ in range(3):
            Attempt(request(), Route(workers[0])).prompt_computed()
        queue.put(request(request_id="later"), inboxes["later"], standing(), history())
        assert inboxes["later"].attempt.route.names == ("a",)
        # Another one of its kind finds nobody alone, and nobody is let in before it.
        queue.put(again("last"), inboxes["last"], standing(), doomed)
        queue.put(request(), Inbox(), standing(), history())
        assert inboxes["last"].attempt is None
        assert len(queue) == 2
        assert inboxes["doomed"].attempt.brought(PROVEN_TOKENS)
        queue.pump()
        assert inboxes["last"].attempt.route.names == ("b",)
        for name in ("doomed", "last"):
            inboxes[name].attempt.close()
        running.close()
        assert (workers[1].num_unproven, workers[1].held_alone) == (0, 0)

    asyncio.run(scenario())


@pytest.mark.parametrize("num_poisons", [1, 3])
def test_a_poison_fells_few_workers_and_ends_nobody_else(num_poisons):
    """As the queue would have it: whoever computes a poison's prompt dies with all that it holds, and comes again."""

    async def scenario():
        workers = Workers(*(member(f"c{number}", "colocated") for number in range(2)))
        queue: RequestQueue = queue_for(workers)
        queue._router = LeastWork(60)
        names = [f"poison-{n}" for n in range(num_poisons)] + [f"good-{n}" for n in range(12)]
        waiting = {name: (Inbox(), history()) for name in names}
        for name in names:
            inbox, record = waiting[name]
            queue.put(request(request_id=name), inbox, standing(), record)
        num_deaths = 0
        ended, finished = set(), set()
        for _ in range(200):
            held = {name: inbox.attempt for name, (inbox, _) in waiting.items() if inbox.attempt is not None}
            if not held:
                break
            bad = next((taken for name, taken in held.items() if name.startswith("poison")), None)
            if bad is None:
                for name, taken in held.items():
                    taken.brought(PROVEN_TOKENS)
                    taken.close()
                    finished.add(name)
                    waiting[name][0].attempt = None
            else:
                num_deaths += 1
                dead = bad.route.decode
                dead.end = WorkerDied("dead")
                workers.members.remove(dead)
                for name, taken in held.items():
                    if taken.route.decode is not dead:
                        continue
                    inbox, record = waiting[name]
                    taken.close()
                    inbox.attempt = None
                    try:
                        record.failed(taken, died(dead))
                    except RecoveriesExhausted:
                        ended.add(name)
                        continue
                    queue.put(again(name), inbox, standing(), record)
                workers.members.append(member(dead.name, "colocated"))
            queue.pump()
        assert ended == {name for name in names if name.startswith("poison")}
        assert finished == {name for name in names if name.startswith("good")}
        assert num_deaths <= 4 * num_poisons

    asyncio.run(scenario())
