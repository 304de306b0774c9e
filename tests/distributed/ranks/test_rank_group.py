"""The ranks of a worker: they obey in order, and when one dies, fails or stalls, all end, by name and in time."""

from __future__ import annotations

import errno
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from anabranch.config.worker import WorkerConfig
from anabranch.engine.pending import PendingResult
from anabranch.engine.warm_up import warm_up_plans
from anabranch.errors import ConfigError, WorkerDied
from anabranch.step.plan import StepPlan
from runtime.ranks import Ranks
from tests.distributed.ranks.room import ROOM, Command, Event, Fail, Said, Say, Sum, Summed
from tests.support.families import save
from tests.support.in_process import wait_until
from tests.support.resources import our_threads
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.distributed

# Of collectives: what a stall may cost.
LIMIT_S = 3.0


class Group:
    """Ranks, and what was heard of them."""

    def __init__(self, config: WorkerConfig) -> None:
        self.events: queue.Queue[tuple[int, Event]] = queue.Queue()
        self.failures: queue.Queue[WorkerDied] = queue.Queue()
        self.ranks = Ranks[Command, Event](
            config,
            ROOM,
            heard=lambda rank, event: self.events.put((rank, event)),
            on_failure=self.failures.put,
        )

    @property
    def pids(self) -> dict[int, int]:
        return self.ranks._group.pids

    def heard(self, num_events: int) -> list[tuple[int, Event]]:
        """The next events, by rank; those of one rank as they came."""
        return sorted((self.events.get(timeout=WAIT_S) for _ in range(num_events)), key=lambda item: item[0])

    def failure(self) -> str:
        return str(self.failures.get(timeout=WAIT_S))


Start = Callable[..., Group]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama-gqa-tied", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that everything temporary lies in."""
    path = tmp_path / "t"
    path.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(path))
    monkeypatch.setenv("TMPDIR", str(path))
    return path


@pytest.fixture
def make(folder: Path, temporary: Path) -> Iterator[Start]:
    """`make(tp=..., **options) -> Group`, not started; nothing of it is left at the end."""
    shm = set(os.listdir("/dev/shm"))
    threads = our_threads()
    with ExitStack() as stack:

        def build(**options: object) -> Group:
            defaults: dict[str, object] = {
                "tp": 2,
                "threads": 1,
                "kv_cache_bytes": 1 << 20,
                "dtype": "float32",
                "native_kernels": False,
                "collective_timeout_s": WAIT_S,
                "lease_s": WAIT_S,
            }
            config = WorkerConfig(
                role="decode", name="talk-0", orchestrator="", model=str(folder), **{**defaults, **options}
            )
            group = Group(config)
            stack.callback(group.ranks.close)
            return group

        yield build
    assert list(temporary.iterdir()) == []
    assert set(os.listdir("/dev/shm")) <= shm
    wait_until(lambda: our_threads() <= threads, "the group's threads to end", describe=our_threads)
    assert not [child for child in psutil.Process().children(recursive=True) if child.name().startswith("talk-0")]


@pytest.fixture
def start(make: Start) -> Start:
    def run(**options: object) -> Group:
        group = make(**options)
        group.ranks.start()
        return group

    return run


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("processes", [True, False])
def test_ranks_obey_in_order_and_compute_together(processes: bool, start: Start, temporary: Path) -> None:
    group = start(tp=3, rank_processes=processes)
    # Once all are connected nothing needs the folder, and nobody has to remove it.
    assert list(temporary.iterdir()) == []
    for text in ("one", "two"):
        group.ranks.send(Say(text=text))
    group.ranks.send(Sum())
    heard = group.heard(9)
    for rank in range(3):
        mine = [event for other, event in heard if other == rank]
        assert [event.text for event in mine if isinstance(event, Said)] == ["one", "two"]
        assert mine[-1] == Summed(total=6.0)
    pids = {rank: event.pid for rank, event in heard if isinstance(event, Said)}
    assert pids[0] == os.getpid()
    assert len(set(pids.values())) == (3 if processes else 1)
    assert group.pids == ({1: pids[1], 2: pids[2]} if processes else {})
    group.ranks.close()
    group.ranks.close()
    assert all(gone(pid) for pid in pids.values() if pid != os.getpid())
    assert group.failures.empty()


def test_processes_are_named_pinned_and_threaded(start: Start) -> None:
    cores = tuple(sorted(os.sched_getaffinity(0)))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores to tell one from the other")
    group = start(cores=cores, threads=0)
    group.ranks.send(Say(text="?"))
    (said,) = [event for rank, event in group.heard(2) if rank == 1]
    assert isinstance(said, Said)
    assert (said.process_name, said.cores, said.num_threads) == ("talk-0.1", (cores[1],), 1)


def test_a_signal_to_the_whole_group_leaves_ranks_to_the_first(start: Start) -> None:
    group = start()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(group.pids[1], number)
    group.ranks.send(Sum())
    assert [event for _, event in group.heard(2)] == [Summed(total=3.0)] * 2


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_a_killed_rank_ends_the_others(backend: str, start: Start) -> None:
    group = start(tp=3, collectives=backend)
    pid = group.pids[2]
    group.ranks.send(Sum())
    group.heard(3)
    os.kill(pid, signal.SIGKILL)
    group.ranks.send(Sum())
    # The others are torn out of their sums, and what they say of it does not come first.
    failure = group.failure()
    assert failure == f"rank 2 of talk-0 (pid {pid}) was killed by SIGKILL"
    (plan, *_) = warm_up_plans(group.ranks._local.engine, "decode")  # type: ignore[union-attr]
    with pytest.raises(WorkerDied, match=re.escape(failure)):
        group.ranks.step(plan)
    group.ranks.close()


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGRTMIN + 5, f"signal {signal.SIGRTMIN + 5}")]
)
def test_an_idle_rank_that_is_killed_is_noticed(number: int, name: str, start: Start) -> None:
    group = start()
    pid = group.pids[1]
    os.kill(pid, number)
    assert group.failure() == f"rank 1 of talk-0 (pid {pid}) was killed by {name}"


def test_a_rank_that_cannot_be_started_is_named_at_once(make: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    group = make()
    monkeypatch.setattr("runtime.rank_group.start_process", refuse)
    with pytest.raises(WorkerDied, match=r"rank 1 of talk-0 could not be started or watched: BlockingIOError: .*temp"):
        group.ranks.start()


@pytest.mark.parametrize("processes", [True, False])
def test_a_rank_that_raises_says_why(processes: bool, start: Start) -> None:
    group = start(tp=3, rank_processes=processes)
    group.ranks.send(Fail(rank=1))
    group.ranks.send(Sum())
    # The other rank is torn out of its sum, and what it says of it does not come first.
    assert group.failure() == "rank 1 of talk-0 failed: InvalidRequest: order: was told to fail"


def test_a_driver_that_fails_in_a_step_ends_all(start: Start) -> None:
    group = start()
    (plan, *_) = warm_up_plans(group.ranks._local.engine, "decode")  # type: ignore[union-attr]

    def fail(plan: StepPlan) -> PendingResult:
        raise ZeroDivisionError("of the driver")

    group.ranks._local.step = fail  # type: ignore[union-attr]
    # The other rank waits in the step's first sum.
    with pytest.raises(WorkerDied, match="the ranks of talk-0 cannot go on: ZeroDivisionError: of the driver"):
        group.ranks.step(plan)
    assert "ZeroDivisionError" in group.failure()


def test_a_stalled_rank_is_missed_in_a_collective(start: Start) -> None:
    group = start(collective_timeout_s=LIMIT_S)
    os.kill(group.pids[1], signal.SIGSTOP)
    group.ranks.send(Sum())
    failure = group.failure()
    assert "talk-0" in failure
    assert "rank 1" in failure
    assert "collective_timeout_s" in failure


def test_a_stalled_rank_is_missed_when_idle(start: Start) -> None:
    group = start(collective_timeout_s=LIMIT_S)
    os.kill(group.pids[1], signal.SIGSTOP)
    assert group.failure() == (f"rank 1 of talk-0 was silent for collective_timeout_s = {LIMIT_S} s")


def test_a_rank_that_is_late_is_waited_for(start: Start) -> None:
    group = start()
    os.kill(group.pids[1], signal.SIGSTOP)
    late = threading.Timer(1.0, os.kill, (group.pids[1], signal.SIGCONT))
    late.start()
    group.ranks.send(Sum())
    assert [event for _, event in group.heard(2)] == [Summed(total=3.0)] * 2
    assert group.failures.empty()
    late.join()


def test_a_rank_that_fails_at_the_start_is_named(make: Start) -> None:
    group = make(max_running=13)
    with pytest.raises(
        WorkerDied, match=r"^rank 1 of talk-0 failed: InvalidRequest: max_running: rank 1 does not like"
    ):
        group.ranks.start()


def test_what_does_not_fit_starts_nothing(make: Start) -> None:
    group = make(tp=7)
    with pytest.raises(ConfigError, match=r"^tp: 7: must be at most the model's 6 query heads"):
        group.ranks.start()
    assert group.pids == {}


def test_ranks_of_a_killed_driver_die_with_it(folder: Path, temporary: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.ranks.driver", str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(gone(pid) for pid in pids)
    finally:
        driver.kill()
        driver.communicate(timeout=WAIT_S)
    wait_until(lambda: all(gone(pid) for pid in pids), "the ranks to end")
    assert list(temporary.iterdir()) == []
