"""Processes that are killed or hang with requests in flight: these go on at others, without gap or repeat."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from anabranch.config.topology import PoolConfig, Pools, RestartConfig, Topology
from anabranch_client import Admin, Client, Sampling, Worker
from launch.cluster import LocalCluster
from tests.support.in_process import wait_until
from tests.support.load import Load
from tests.support.resources import holdings
from tests.support.waiting import WAIT_S
from transport.planes import usable_planes

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

READY_TIMEOUT_S = 120.0
LONG_ANSWER = ([tuple((number * 31 + index) % 97 + 3 for index in range(60)) for number in range(8)], 800)
LONG_PROMPT = ([tuple((number * 31 + index) % 97 + 3 for index in range(1900)) for number in range(12)], 20)
# The last string is in no answer, and keeps a part of the text back.
KINDS = (
    {},
    {"temperature": 0.8, "seed": 11, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    {"logprobs": 2},
    {"temperature": 1.0, "seed": 12, "stop": ("no such text",)},
)

Prompt = tuple[int, ...]


def pool(workers: int) -> PoolConfig:
    return PoolConfig(workers=workers, kv_cache_bytes=16 << 20, threads=1, max_step_tokens=64)


@contextmanager
def running(model: object, transport: str, num_prefill: int, num_decode: int) -> Iterator[tuple[LocalCluster, Admin]]:
    if transport not in usable_planes():
        pytest.skip(f"the {transport} plane cannot be used here")
    topology = Topology(
        model=str(model),
        dtype="float32",
        kv_transport=transport,  # type: ignore[arg-type]
        native_kernels=False,
        prefix_cache=False,
        restart=RestartConfig(policy="never"),  # what is left is looked at
        pools=Pools(prefill=pool(num_prefill), decode=pool(num_decode)),
    )
    with (
        LocalCluster(topology, ready_timeout_s=READY_TIMEOUT_S) as cluster,
        Admin(cluster.endpoint, token_file=cluster.admin_token_file) as admin,
    ):
        yield cluster, admin


def find(admin: Admin, name: str) -> Worker | None:
    return next((worker for worker in admin.cluster().workers if worker.name == name), None)


def busy(admin: Admin, name: str) -> bool:
    worker = find(admin, name)
    return worker is not None and worker.num_requests > 0


def idle(admin: Admin) -> bool:
    state = admin.cluster()
    return state.num_requests == 0 and all(
        (worker.num_free_blocks, worker.num_leases, worker.num_running) == (worker.num_total_blocks, 0, 0)
        for worker in state.workers
    )


def check_answers(client: Client, good: dict[Prompt, Prompt]) -> None:
    def ask(item: tuple[Prompt, Prompt]) -> Prompt:
        sampling = Sampling(max_tokens=len(item[1]), temperature=0.0, ignore_eos=True)
        return client.complete(item[0], sampling).token_ids

    with ThreadPoolExecutor(len(good)) as threads:
        assert list(threads.map(ask, good.items())) == list(good.values())


def strike(cluster: LocalCluster, admin: Admin, load: Load, victim: str) -> list[str]:
    """Kill `victim` under load; how the requests ended."""
    pid = cluster.process(victim).pid
    num_deaths = len(cluster.deaths)
    wait_until(lambda: busy(admin, victim), f"requests at {victim}")
    if victim.startswith("decode"):
        wait_until(lambda: any(load.tokens), "tokens")
    os.kill(pid, signal.SIGKILL)
    death = cluster.wait_for_death(WAIT_S, after=num_deaths)
    assert death is not None
    assert (death.name, death.reason) == (victim, "was killed by SIGKILL")
    wait_until(lambda: find(admin, victim) is None, f"{victim} to be gone")
    results = load.results()
    departures = [gone for gone in admin.cluster().departures if gone.name == victim]
    assert [(gone.pid, gone.expected) for gone in departures] == [(pid, False)]
    # Its parent's report and the broken connection race.
    assert departures[0].reason in ("was killed by SIGKILL", "its control connection is gone")
    wait_until(lambda: idle(admin), "idle")
    return results


def test_one_of_two_is_killed(known, good) -> None:
    with running(known.folder, "tcp", 2, 2) as (cluster, admin):
        with Client(cluster.endpoint, timeout_s=60.0) as client:
            check_answers(client, good)
            for victim, work, others in (
                ("decode-0", LONG_ANSWER, {"prefill-0+decode-1", "prefill-1+decode-1"}),
                ("prefill-0", LONG_PROMPT, {"prefill-0+decode-1", "prefill-1+decode-1"}),
            ):
                struck = Load(client, *work, KINDS)
                assert set(strike(cluster, admin, struck, victim)) <= others
                assert max(struck.recoveries) == 1
                undisturbed = Load(client, *work, KINDS)
                undisturbed.results()
                assert max(undisturbed.recoveries) == 0
                # Index by index, whatever was asked for.
                assert struck.tokens == undisturbed.tokens
                assert struck.texts == undisturbed.texts
                for found, expected in zip(struck.logprobs, undisturbed.logprobs, strict=True):
                    assert found == pytest.approx(expected, abs=1e-3)
                check_answers(client, good)
        assert [death.name for death in cluster.deaths] == ["decode-0", "prefill-0"]
        table = {process.name: process.alive for process in cluster.processes}
        assert [name for name, alive in table.items() if not alive] == ["prefill-0", "decode-0"]
        # What is left goes on without losing a descriptor or thread to clients that come and leave.
        pids = {name: cluster.process(name).pid for name in ("orchestrator", "prefill-1", "decode-1")}

        def come_and_leave() -> None:
            with Client(cluster.endpoint) as client:
                streams = [client.generate(prompt, Sampling(max_tokens=1500)) for prompt in LONG_ANSWER[0]]
                for number, stream in enumerate(streams):
                    for _ in range(number % 3):
                        next(stream)
                    stream.close()
                check_answers(client, good)
            wait_until(lambda: idle(admin), "idle")

        come_and_leave()
        before = {name: holdings(pid) for name, pid in pids.items()}
        for _ in range(3):
            come_and_leave()

        def more() -> str:
            # Pools of threads grow to their size when all of them are busy.
            beyond = {name: holdings(pid).beyond(before[name], spare_threads=4) for name, pid in pids.items()}
            return "; ".join(f"{name}: {held}" for name, held in beyond.items() if held)

        wait_until(lambda: not more(), "descriptors and threads to return:", describe=more)


def test_a_worker_hangs_then_the_last_of_a_role_is_killed_then_the_orchestrator(known, good) -> None:
    with running(known.folder, "ucx", 1, 2) as (cluster, admin), Client(cluster.endpoint, timeout_s=60.0) as client:
        check_answers(client, good)
        # Hangs: noticed by its silence. Woken again it learns that it counts as dead, and ends.
        load = Load(client, *LONG_ANSWER)
        hung = cluster.process("decode-0").pid
        wait_until(lambda: busy(admin, "decode-0") and any(load.tokens), "tokens")
        os.kill(hung, signal.SIGSTOP)
        assert set(load.results()) == {"prefill-0+decode-1"}
        assert max(load.recoveries) == 1
        assert [gone.reason[:13] for gone in admin.cluster().departures] == ["it was silent"]
        check_answers(client, good)
        assert cluster.deaths == ()
        os.kill(hung, signal.SIGCONT)
        death = cluster.wait_for_death(WAIT_S)
        assert death is not None
        assert (death.name, death.reason) == ("decode-0", "exited with code 1")
        assert "counts as dead" in death.log_tail[-1]
        check_answers(client, good)
        # The only prefill worker: nothing can be served any more.
        results = strike(cluster, admin, Load(client, LONG_PROMPT[0][:2], 20), "prefill-0")
        assert all(result.startswith("no_workers: no_worker_grace_s: ") for result in results), results
        assert client.health() == "not_serving"
        refused = Load(client, LONG_PROMPT[0][:2], 4).results()
        assert all(result.startswith("no_workers: no prefill worker takes requests") for result in refused), refused
        os.kill(cluster.process("orchestrator").pid, signal.SIGKILL)
        assert all(result.startswith("unavailable: ") for result in Load(client, LONG_PROMPT[0][:2], 4).results())
        death = cluster.wait_for_death(WAIT_S, after=2)
        assert death is not None
        assert death.name == "orchestrator"
    assert [death.name for death in cluster.deaths] == ["decode-0", "prefill-0", "orchestrator"]
    assert not cluster.folder.exists()


def test_a_shared_process_is_killed(known, good) -> None:
    with running(known.folder, "inproc", 1, 1) as (cluster, admin), Client(cluster.endpoint, timeout_s=60.0) as client:
        check_answers(client, good)
        load = Load(client, *LONG_ANSWER)
        wait_until(lambda: any(load.tokens), "tokens")
        pid = cluster.process("inproc").pid
        os.kill(pid, signal.SIGKILL)
        results = load.results()
        assert all(result.startswith("no_workers: no_worker_grace_s: ") for result in results), results
        assert {gone.pid for gone in admin.cluster().departures} == {pid}
        assert {gone.name for gone in admin.cluster().departures} == {"prefill-0", "decode-0"}
        assert [death.name for death in cluster.deaths] == ["inproc"]
        wait_until(lambda: idle(admin), "idle")
