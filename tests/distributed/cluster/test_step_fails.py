"""A step raises on a worker of one rank while the next is in flight: its requests end, who joined later goes on."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from anabranch import errors
from anabranch.engine.pending import PendingResult
from anabranch.step.plan import StepPlan
from anabranch_client import Client, ClientError, Sampling, WorkerDied
from tests.support.in_process import InProcessCluster, wait_until
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.distributed


def flying(worker) -> list[int]:
    """How many sequences each step in flight has."""
    return [len(launched.plan.sequences) for launched in tuple(worker._in_flight[0])]


def test_requests_of_the_step_end_and_one_that_joined_behind_it_does_not(serve, still_serves, good) -> None:
    cluster, client = serve("prefill", "decode", orchestrator={"max_recoveries": 0})
    worker = cluster.worker("decode-1")
    runner = worker.ranks._local.engine.runner
    (_, (prompt, answer), *_) = good.items()
    with ThreadPoolExecutor(1) as executor, cluster.throttled("decode-1") as throttle:
        first = client.generate((5,) * 9, Sampling(max_tokens=1500, ignore_eos=True))
        throttle.allow(2)
        second = executor.submit(client.complete, prompt, Sampling(max_tokens=len(answer), ignore_eos=True))
        # Until the step that waits was planned before the second one joined, and the one behind it after.
        deadline_s = time.monotonic() + WAIT_S
        while flying(worker) != [1, 2]:
            assert time.monotonic() < deadline_s
            throttle.allow(1)
            wait_until(lambda: len(flying(worker)) == 2, "a step behind the one that waits")
        forward = runner.stack.forward
        failing: list[StepPlan] = []
        step = throttle._step

        def fail(*args: object) -> object:
            raise ZeroDivisionError("of this step")

        def run(plan: StepPlan) -> PendingResult:
            runner.stack.forward = forward if failing else fail
            failing.append(plan)
            return step(plan)

        throttle._step = run
        throttle.open()
        with pytest.raises(ClientError, match="of this step"):
            list(first)
        assert second.result(WAIT_S).token_ids == answer
    # The one behind followed what was never sampled; then the second went on alone, with what was known of it.
    assert [s.follows for s in failing[1].sequences] == [0, None]
    assert [len(plan.sequences) for plan in failing[:3]] == [1, 2, 1]
    assert [s.follows for s in failing[2].sequences] == [None]
    still_serves(cluster, client)


@pytest.mark.parametrize("name", ["prefill-0", "decode-1"])
def test_a_step_that_hangs_ends_its_worker_by_name(tmp_path, known, name) -> None:
    """Its event loop goes on, and so do its beats; their word of the step in hand is what the orchestrator goes by."""
    reason = r"step_stall_s: .* has been at one thing for \d+\.\d s, longer than 2 s; .*"

    def serve() -> None:
        with (
            InProcessCluster(
                tmp_path,
                known.folder,
                ("prefill", "decode"),
                step_stall_s=2.0,
                orchestrator={"worker_timeout_s": 1.0, "max_recoveries": 0},
            ) as cluster,
            Client(cluster.endpoint, timeout_s=30.0) as client,
            cluster.throttled(name) as throttle,
        ):
            stream = client.generate((5,) * 9, Sampling(max_tokens=1500, ignore_eos=True))
            if name == "decode-1":
                throttle.allow(3)
            with pytest.raises(WorkerDied, match=reason):
                list(stream)
            throttle.open()
            wait_until(lambda: cluster._error is not None, "the end of the worker")

    with pytest.raises(errors.WorkerDied, match=reason):
        serve()
