"""What becomes of clients that ask for ten times what workers can do: the queue, refusals, goodput, fairness.

A real orchestrator over real sockets, with simulated workers (`benchmarks/sim_worker.py`). Clients come at random
times, whether or not others have been served, and do not come back. Goodput: requests per second that end within their
deadline. Tenants' shares are compared in tokens served, prompts and answers.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import uvloop

from anabranch_client import Accepted, Admin, AsyncClient, DeadlineExceeded, Overloaded, Sampling, Tokens
from benchmarks.load import quantile
from benchmarks.report import Figure, parse_options, report
from benchmarks.sim_cluster import SimCluster
from benchmarks.sim_worker import Rates
from orchestrator.fair_order import FairOrder
from orchestrator.tenants import Tenants

PROMPT_TOKENS, ANSWER_TOKENS = 64, 8
WORKERS = 2
RATES = Rates(step_s=0.04, prefill_tokens_per_s=64 / 0.02, max_running=4)
# A request takes as many steps as it has tokens, shared with `max_running` others, and its prompt's time alone.
CAPACITY_PER_S = WORKERS / (
    ANSWER_TOKENS / RATES.max_running * RATES.step_s + PROMPT_TOKENS / RATES.prefill_tokens_per_s
)
MAX_QUEUED = 48
DEADLINE_S = 6.0
WARM_UP_S = 3.0
PRIORITY_STEP_S = 0.2
NUM_CHANNELS = 4


@dataclass(frozen=True, kw_only=True)
class Party:
    """Some of the clients.

    Attributes:
        load: how many times what workers can do they ask for.
    """

    load: float
    tenant: str | None = None
    priority: int = 0


@dataclass
class Tally:
    """What one party saw after the warm-up."""

    num_done: int = 0
    num_late: int = 0
    num_refused: int = 0
    num_tokens: int = 0
    refusals_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    retries_s: list[float] = field(default_factory=list)


class Load:
    """Clients of several parties for a while.

    Attributes:
        tallies: one for each party.
        most_queued: requests that waited for a worker, at most, as the operator sees them.
        calls_s: what a call that asks for nothing but the model's name took meanwhile.
    """

    def __init__(self, cluster: SimCluster, parties: Sequence[Party], duration_s: float) -> None:
        self._cluster = cluster
        self._parties = parties
        self._duration_s = duration_s
        self.tallies = [Tally() for _ in parties]
        self.most_queued = 0
        self.calls_s: list[float] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: BaseException | None = None

    async def run(self) -> None:
        self._from_s = time.perf_counter() + WARM_UP_S
        self._until_s = self._from_s + self._duration_s
        clients = [AsyncClient(self._cluster.endpoint) for _ in range(NUM_CHANNELS)]
        watch = asyncio.create_task(self._watch())
        await asyncio.gather(
            *(self._come(number, party, clients) for number, party in enumerate(self._parties)),
        )
        # Those that still wait are of no interest any more.
        for task in self._tasks:
            task.cancel()
        watch.cancel()
        await asyncio.gather(*self._tasks, watch, return_exceptions=True)
        for client in clients:
            await client.close()
        if self._failed is not None:
            raise self._failed

    async def _come(self, number: int, party: Party, clients: list[AsyncClient]) -> None:
        rng = random.Random(number)
        next_s = time.perf_counter()
        while next_s < self._until_s:
            next_s += rng.expovariate(party.load * CAPACITY_PER_S)
            await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
            task = asyncio.create_task(self._ask(party, self.tallies[number], rng.choice(clients)))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failed = self._failed or task.exception()

    def _counts(self) -> bool:
        return self._from_s <= time.perf_counter() < self._until_s

    async def _ask(self, party: Party, tally: Tally, client: AsyncClient) -> None:
        began_s = time.perf_counter()
        waited = False
        stream = client.generate(
            [97] * PROMPT_TOKENS,
            Sampling(max_tokens=ANSWER_TOKENS, ignore_eos=True),
            tenant=party.tenant,
            priority=party.priority,
            timeout_s=DEADLINE_S,
        )
        try:
            async for event in stream:
                if isinstance(event, Tokens) and self._counts():
                    if event.first_index == 0:
                        tally.num_tokens += PROMPT_TOKENS
                        tally.waits_s.append(time.perf_counter() - began_s)
                    tally.num_tokens += len(event.token_ids)
                waited = waited or isinstance(event, Accepted)
        except Overloaded as error:
            if self._counts():
                tally.num_refused += 1
                tally.refusals_s.append(time.perf_counter() - began_s)
                if waited or error.retry_after_s is None:
                    raise RuntimeError("a refusal came late, or without a time to try again") from error
                tally.retries_s.append(error.retry_after_s)
        except DeadlineExceeded:
            tally.num_late += self._counts()
        else:
            tally.num_done += self._counts()

    async def _watch(self) -> None:
        token_file = self._cluster.admin_token_file
        async with AsyncClient(self._cluster.endpoint) as client:
            with Admin(self._cluster.endpoint, token_file=token_file) as admin:
                await self._look(admin, client)

    async def _look(self, admin: Admin, client: AsyncClient) -> None:
        while True:
            cluster = await asyncio.to_thread(admin.cluster)
            self.most_queued = max(self.most_queued, cluster.num_queued)
            began_s = time.perf_counter()
            await client.model()
            if self._counts():
                self.calls_s.append(time.perf_counter() - began_s)
            await asyncio.sleep(0.05)


async def run(parties: Sequence[Party], duration_s: float, **options: object) -> Load:
    """Put a load on a new cluster."""
    options = {"max_queued": MAX_QUEUED, "prefill_ahead_tokens": PROMPT_TOKENS, **options}
    with SimCluster(WORKERS, RATES, options) as cluster:
        load = Load(cluster, parties, duration_s)
        await load.run()
    return load


async def overloaded(loads: Sequence[float], duration_s: float) -> list[Figure]:
    """One tenant asks for more and more."""
    runs = {load: await run([Party(load=load)], duration_s) for load in loads}
    goodput = {load: runs[load].tallies[0].num_done / duration_s for load in loads}
    peak, worst = max(goodput.values()), runs[loads[-1]]
    tally = worst.tallies[0]
    figures = [
        Figure(
            key=f"goodput_at_{load:g}x",
            value=goodput[load],
            unit="1/s",
            reference=CAPACITY_PER_S,
            reference_name="workers' own",
        )
        for load in loads[:-1]
    ]
    name = f"{loads[-1]:g}x"
    return [
        *figures,
        Figure(
            key=f"goodput_at_{name}",
            value=goodput[loads[-1]],
            unit="1/s",
            reference=peak,
            reference_name="peak",
            target=0.9,
        ),
        Figure(
            key="most_queued",
            value=worst.most_queued,
            unit="requests",
            reference=MAX_QUEUED,
            reference_name="max_queued",
            target=1.0,
            higher_is_better=False,
        ),
        Figure(key="refusal_p50", value=1e3 * quantile(tally.refusals_s, 0.5), unit="ms"),
        Figure(key="any_call_p99", value=1e3 * quantile(worst.calls_s, 0.99), unit="ms"),
        Figure(
            key="refusal_p99",
            value=1e3 * quantile(tally.refusals_s, 0.99),
            unit="ms",
            target=50.0,
            higher_is_better=False,
        ),
        Figure(key="refused", value=tally.num_refused / duration_s, unit="1/s"),
        Figure(key="late", value=tally.num_late / duration_s, unit="1/s"),
        Figure(key="retry_after_p50", value=quantile(tally.retries_s, 0.5), unit="s"),
    ]


async def fair(duration_s: float) -> list[Figure]:
    """Tenants share what there is."""
    equal = (await run([Party(load=7.5, tenant="a"), Party(load=2.5, tenant="b")], duration_s)).tallies
    two = [Party(load=5.0, tenant="gold"), Party(load=5.0, tenant="free")]
    weighted = (await run(two, duration_s, tenant_weights=["gold=3"])).tallies
    idle = (await run([Party(load=10.0, tenant="a"), Party(load=0.2, tenant="b")], duration_s)).tallies
    unlike = abs(1.0 - equal[0].num_tokens / max(1, equal[1].num_tokens))
    ratio = weighted[0].num_tokens / max(1, weighted[1].num_tokens)
    all_tokens = sum(tally.num_tokens for tally in idle) / duration_s
    return [
        Figure(key="equal_tenants_differ", value=unlike, unit="of tokens", target=0.05, higher_is_better=False),
        Figure(key="weights_3_to_1", value=ratio, unit="to 1"),
        Figure(key="weights_3_to_1_off", value=abs(ratio / 3.0 - 1.0), unit="of 3", target=0.1, higher_is_better=False),
        Figure(
            key="one_of_two_asks_little",
            value=all_tokens,
            unit="tokens/s",
            reference=CAPACITY_PER_S * (PROMPT_TOKENS + ANSWER_TOKENS),
            reference_name="workers' own",
        ),
        Figure(key="refused_of_who_asks_little", value=idle[1].num_refused / duration_s, unit="1/s"),
    ]


async def starved(duration_s: float) -> list[Figure]:
    """Urgent requests alone are more than workers can do."""
    three = [Party(load=2.0, priority=-5), Party(load=2.0), Party(load=2.0, priority=5)]
    urgent, usual, lowest = (await run(three, duration_s, priority_step_s=PRIORITY_STEP_S)).tallies
    return [
        Figure(key=f"priority_{name}_served", value=tally.num_done / duration_s, unit="1/s")
        for name, tally in (("-5", urgent), ("0", usual))
    ] + [
        Figure(key="priority_5_served", value=lowest.num_done / duration_s, unit="1/s", target=1e-9),
        Figure(key="priority_-5_wait_p50", value=quantile(urgent.waits_s or [0.0], 0.5), unit="s"),
        Figure(key="priority_5_wait_p50", value=quantile(lowest.waits_s or [0.0], 0.5), unit="s"),
    ]


def order_step(num_waiting: int) -> float:
    """Seconds to take the head out of an order of 100 tenants and 5 priorities, and to put another one in; the best."""
    tenants = Tenants({})
    order: FairOrder[int] = FairOrder(tenants, 1.0)
    accounts = [tenants.open(f"t{number}") for number in range(100)]
    for number in range(num_waiting):
        order.put(number, accounts[number % 100], number % 5, 64, number * 1e-3)
    best_s = 1.0
    for turn in range(10):
        began_s = time.perf_counter()
        for number in range(100):
            head = order.head()
            assert head is not None
            order.remove(head)
            head.account.charge(64)
            order.put(number, head.account, number % 5, 64, 1000.0 + turn)
        best_s = min(best_s, (time.perf_counter() - began_s) / 100)
    return best_s


async def measured(*, quick: bool) -> list[Figure]:
    """All that needs a cluster; in one event loop, for gRPC's threads know no other."""
    loads = (1.0, 10.0) if quick else (0.5, 1.0, 1.5, 2.0, 4.0, 10.0)
    return [
        *await overloaded(loads, 4.0 if quick else 20.0),
        *await fair(5.0 if quick else 20.0),
        *await starved(4.0 if quick else 20.0),
    ]


def main() -> int:
    options = parse_options("overload", __doc__)
    figures = uvloop.run(measured(quick=options.quick))
    figures.append(
        Figure(
            key="order_step_at_10000",
            value=1e6 * order_step(10_000),
            unit="us",
            reference=1e6 * order_step(100),
            reference_name="at 100",
            target=3.0,
            higher_is_better=False,
        )
    )
    return report("overload", figures, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
