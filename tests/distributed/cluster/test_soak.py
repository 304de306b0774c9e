"""Ten seconds of everything at once: each request ends once, each token comes once and right, nothing is left."""

from __future__ import annotations

import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from anabranch_client import (
    Accepted,
    CallCancelled,
    Client,
    DeadlineExceeded,
    Finished,
    InvalidRequest,
    Sampling,
    Tokens,
)
from tests.support.in_process import InProcessCluster, wait_until
from tests.support.known import Known
from tests.support.resources import holdings
from tests.support.waiting import WAIT_S
from transport.planes import usable_planes

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SOAK_S = 8.0
# Each of two prefill with each of two decode workers, and the colocated one.
NUM_ROUTES = 5
NUM_CLIENTS = 12
NUM_TOKENS = 64
SEED = 20

Prompt = tuple[int, ...]


@pytest.fixture(scope="module")
def answers(known: Known) -> list[tuple[Prompt, Prompt]]:
    lengths = (1, 7, 16, 24, 33, 40, 57, 64, 70, 81)
    first = [known.clear(length, NUM_TOKENS) for length in lengths]
    # These begin like others, so that the prefix cache has something to give.
    return first + [known.clear(len(prompt) + 20, NUM_TOKENS, prompt) for prompt, _ in first]


class Visitor:
    """One client that asks again and again, and behaves as a random generator says."""

    def __init__(self, endpoint: str, seed: int, answers: list[tuple[Prompt, Prompt]]) -> None:
        self.fates: Counter[str] = Counter()
        self.routes: set[tuple[str, ...]] = set()
        self._endpoint = endpoint
        self._client = Client(endpoint, timeout_s=60.0)
        self._rng = random.Random(seed)
        self._answers = answers

    def visit(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            self._ask()
        self._client.close()

    def _ask(self) -> None:
        rng = self._rng
        prompt, answer = rng.choice(self._answers)
        fate = rng.choices(["finish", "stop", "cancel", "disconnect", "deadline", "bad"], [6, 2, 3, 1, 2, 1])[0]
        wanted = rng.randint(1, NUM_TOKENS)
        sampling = Sampling(max_tokens=wanted, temperature=0.0, ignore_eos=True)
        expected = answer[:wanted]
        if fate == "stop":
            stop = rng.choice(answer)
            expected = answer[: answer.index(stop) + 1][:wanted]
            sampling = Sampling(max_tokens=wanted, temperature=0.0, ignore_eos=True, stop_token_ids=[stop])
        elif fate == "bad":
            sampling = Sampling(max_tokens=wanted, temperature=-1.0)
        timeout_s = rng.uniform(0.001, 0.1) if fate == "deadline" else 60.0
        leave_after = rng.randint(0, 4) if fate in ("cancel", "disconnect") else None
        client = Client(self._endpoint) if fate == "disconnect" else self._client
        seen: list[int] = []
        ends = 0
        try:
            with client.generate(prompt, sampling, timeout_s=timeout_s) as stream:
                for count, event in enumerate(stream):
                    assert ends == 0, "an event after the end"
                    if isinstance(event, Accepted):
                        assert count == 0
                    elif isinstance(event, Tokens):
                        assert event.first_index == len(seen), "a gap or a repetition"
                        seen.extend(event.token_ids)
                    else:
                        assert isinstance(event, Finished)
                        assert event.usage.num_output_tokens == len(seen)
                        self.routes.add(event.route)
                        ends += 1
                    if count == leave_after:
                        break
            if fate == "disconnect":
                client.close()
        except (DeadlineExceeded, CallCancelled, InvalidRequest) as error:
            ended_by = "bad" if isinstance(error, InvalidRequest) else "deadline"
            assert (fate, ends) == (ended_by, 0)
            assert tuple(seen) == expected[: len(seen)]
            self.fates[fate] += 1
            return
        assert tuple(seen) == expected[: len(seen)], f"wrong tokens for a prompt of {len(prompt)}"
        if ends:
            assert tuple(seen) == expected
        else:
            assert leave_after is not None, "no end"
        self.fates["finished" if ends else fate] += 1


@pytest.mark.parametrize("plane", ["inproc", "tcp", "ucx"])
def test_everything_at_once(known: Known, answers: list[tuple[Prompt, Prompt]], tmp_path, plane: str) -> None:
    if plane not in usable_planes():
        pytest.skip(f"the {plane} plane cannot be used here")
    roles = ("prefill", "prefill", "decode", "decode", "colocated")
    small = {"kv_cache_bytes": 28 * known.block_bytes(8), "block_size": 8, "max_context": 170}
    with InProcessCluster(
        tmp_path,
        known.folder,
        roles,
        by_role={"decode": small, "colocated": small},
        kv_transport=plane,
        max_step_tokens=40,
    ) as cluster:
        # So that all links, threads and gRPC's own descriptors are there.
        routes: set[tuple[str, ...]] = set()
        deadline_s = time.monotonic() + WAIT_S
        while len(routes) < NUM_ROUTES:
            assert time.monotonic() < deadline_s, f"only {routes}"
            routes |= soak(cluster, answers, 0.5, SEED)[1]
        before = holdings()
        fates, _ = soak(cluster, answers, SOAK_S / 3, SEED + 1)
        assert set(fates) == {"finished", "cancel", "disconnect", "deadline", "bad"}, fates
        assert sum(worker.scheduler.num_preempted for worker in cluster.workers[2:]) > 0
        for minutes in cluster.minutes.values():
            assert minutes.ended, "a worker without work"

        def more() -> str:
            return holdings().beyond(before, spare_threads=12)

        wait_until(lambda: not more(), "descriptors and threads to return:", describe=more)


def soak(
    cluster: InProcessCluster, answers: list[tuple[Prompt, Prompt]], length_s: float, seed: int
) -> tuple[Counter[str], set[tuple[str, ...]]]:
    """Let clients come for `length_s`; what became of their requests, and the routes of those that ended well.

    Ends with an idle, checked cluster.
    """
    until_s = time.monotonic() + length_s
    visitors = [Visitor(cluster.endpoint, seed * 100 + number, answers) for number in range(NUM_CLIENTS)]
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        for visit in [pool.submit(visitor.visit, until_s) for visitor in visitors]:
            visit.result(60)
    cluster.wait_idle()
    fates = sum((visitor.fates for visitor in visitors), Counter())
    return fates, set().union(*(visitor.routes for visitor in visitors))
