"""A rank that dies, stalls, leaves, aborts or disagrees: the others are told, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
import torch

from anabranch.errors import ConfigError, DeadlineExceeded, PeerLost, TransportError
from tests.support.waiting import WAIT_S, eventually
from transport.collectives import CollectiveGroup, create_group
from transport.collectives.segment import Ticket

if TYPE_CHECKING:
    from conftest import Ranks

pytestmark = pytest.mark.distributed

Wait = Callable[[CollectiveGroup, int], object]


def ring(group: CollectiveGroup, length: int) -> None:
    x = torch.ones(length)
    group.post([x], (group.rank + 1) % group.size, [torch.empty_like(x)], (group.rank - 1) % group.size).wait()


def hope_for(group: CollectiveGroup, source: int) -> None:
    """Wait for what `source` never sends."""
    group.post([], source, [torch.empty(3)], source).wait()


WAITS: dict[str, Wait] = {
    "all_reduce": lambda group, turn: group.all_reduce(torch.ones(300)),
    "large all_reduce": lambda group, turn: group.all_reduce(torch.ones(400_000)),
    "all_gather": lambda group, turn: group.all_gather(torch.ones(300), 0),
    "barrier": lambda group, turn: group.barrier(),
    "transfer": lambda group, turn: ring(group, 300),
    "large transfer": lambda group, turn: ring(group, 400_000),
}


@pytest.mark.parametrize("backend", ["shm", "gloo"])
@pytest.mark.parametrize("what", WAITS)
def test_a_killed_rank_ends_the_others_waits(ranks: Ranks, backend: str, what: str) -> None:
    def body(group: CollectiveGroup) -> object:
        for turn in range(1_000_000):
            if turn == 30 and group.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            WAITS[what](group, turn)
        return None

    ranks.start(3, body, backend=backend)
    first, killed, third = ranks.wait()
    assert killed.signal == signal.SIGKILL
    for outcome in (first, third):
        assert outcome.error == "PeerLost", outcome
        if backend == "shm":
            assert "rank 1 (pid " in outcome.message
            assert ") died" in outcome.message


@pytest.mark.parametrize("what", WAITS)
def test_a_stalled_rank_is_named_at_the_deadline(ranks: Ranks, what: str) -> None:
    def body(group: CollectiveGroup) -> object:
        for turn in range(1_000_000):
            if turn == 30 and group.rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            WAITS[what](group, turn)
        return None

    pids = ranks.start(2, body, timeout_s=1.0)
    first = ranks.wait_for(0)
    assert first.error == "DeadlineExceeded", first
    assert "waited for rank 1 in" in first.message
    assert what.split()[-1] in first.message
    assert "collective_timeout_s = 1 s" in first.message
    # What stalled finds, when it goes on, that the group is over: it does not sum with nobody.
    os.kill(pids[1], signal.SIGCONT)
    (second,) = ranks.wait()
    assert second.error in ("DeadlineExceeded", "PeerLost"), second


def test_ranks_that_are_all_stopped_go_on(ranks: Ranks, tmp_path: Path) -> None:
    """Rank 0 waits for rank 1 for longer than it may, but is stopped itself for most of it."""
    running, enough = tmp_path / "running", tmp_path / "enough"

    def body(group: CollectiveGroup) -> object:
        turn = 0
        # Rank 0 alone says when both stop.
        while not group.all_reduce(torch.tensor([float(group.rank == 0 and enough.exists())])):
            x = torch.full((4,), float(turn + group.rank))
            assert torch.equal(group.all_reduce(x), torch.full((4,), 2.0 * turn + 1.0))
            turn += 1
            if turn == 30 and group.rank == 0:
                running.touch()
        return turn

    pids = ranks.start(2, body, timeout_s=2.0)
    eventually(running.exists, "the ranks to run")
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(0.2)  # rank 0 waits
    os.kill(pids[0], signal.SIGSTOP)
    time.sleep(2.5)  # the subject
    os.kill(pids[0], signal.SIGCONT)
    time.sleep(0.2)  # it finds its time to be over, by other clocks
    os.kill(pids[1], signal.SIGCONT)
    enough.touch()
    first, second = ranks.wait()
    assert (first.error, second.error) == ("", ""), first
    assert first.value == second.value


def test_the_first_failure_is_everybodys(ranks: Ranks) -> None:
    """Rank 0 has a long deadline, but the group is over when rank 2's shorter one is."""

    def body(group: CollectiveGroup) -> object:
        if group.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        group.all_reduce(torch.ones(4))
        return None

    ranks.start(3, body, timeout_s=(20.0, 20.0, 0.3))
    for outcome in (ranks.wait_for(0), ranks.wait_for(2)):
        assert outcome.error == "DeadlineExceeded", outcome
        assert "rank 2 waited for rank 1 in all_reduce longer than collective_timeout_s = 0.3 s" in outcome.message


def names_in_shm() -> set[str]:
    """What is in /dev/shm but UCX's, which others' processes on this machine may bring and take."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("ucx_")}


def make_many(group: CollectiveGroup, wait: Wait) -> None:
    for _ in range(1000):
        wait(group, 2)


def test_closing_ends_a_call_of_another_thread(ranks: Ranks) -> None:
    def body(group: CollectiveGroup) -> object:
        timer = threading.Timer(0.05, group.close)
        if group.rank == 0:
            timer.start()
        with pytest.raises(PeerLost, match=r"rank 0 closed the group|has closed it"):
            hope_for(group, 1 - group.rank)
        return None

    for _ in range(5):
        ranks.run(2, body)


@pytest.mark.parametrize("what", WAITS)
def test_abort_ends_waits_everywhere_and_for_good(ranks: Ranks, what: str) -> None:
    def body(group: CollectiveGroup) -> object:
        if group.rank == 2:
            # The others are, or will be, in calls that this rank never makes.
            threading.Timer(0.1, group.abort, args=("the worker drains",)).start()
        wait = WAITS[what] if group.rank != 2 else lambda group, turn: hope_for(group, 0)
        with pytest.raises(PeerLost, match="the worker drains"):
            make_many(group, wait)
        with pytest.raises(PeerLost, match="the worker drains"):
            group.all_reduce(torch.ones(3))
        with pytest.raises(PeerLost, match="the worker drains"):
            group.post([torch.ones(3)], 0, [], 0)
        return None

    ranks.run(3, body)


def test_ranks_that_disagree_are_told(ranks: Ranks) -> None:
    cases: list[tuple[Callable[[CollectiveGroup], object], Callable[[CollectiveGroup], object], str]] = [
        (lambda g: g.all_reduce(torch.ones(4)), lambda g: g.barrier(), "ranks disagree"),
        (lambda g: g.all_reduce(torch.ones(4)), lambda g: g.all_reduce(torch.ones(5)), "all_reduce of 20"),
        (lambda g: g.all_reduce(torch.ones(4)), lambda g: g.all_reduce(torch.ones(4, dtype=torch.int32)), "type"),
        (lambda g: g.all_gather(torch.ones(4), 0), lambda g: g.all_gather(torch.ones(9), 0), "36"),
        (lambda g: ring(g, 4), lambda g: ring(g, 5), "sends"),
        (lambda g: ring(g, 4), lambda g: ring(g, 90_000), "sends"),
        (lambda g: ring(g, 90_001), lambda g: ring(g, 90_000), "sends"),
    ]
    for ours, theirs, words in cases:

        def body(group: CollectiveGroup, ours=ours, theirs=theirs, words=words) -> object:  # type: ignore[no-untyped-def]
            with pytest.raises(TransportError, match=words):
                (theirs if group.rank else ours)(group)
            return None

        ranks.run(2, body)


def test_a_rank_that_left_is_no_dead_rank(ranks: Ranks) -> None:
    def body(group: CollectiveGroup) -> object:
        group.all_reduce(torch.ones(3))
        if group.rank == 1:
            return None  # leaves; the other two go on
        peer = 2 - group.rank
        received = torch.empty(500_000)
        for _ in range(20):
            group.post([torch.ones(500_000)], peer, [received], peer).wait()
        # Long enough for both to look around more than once.
        with pytest.raises(PeerLost, match=r"rank 1 .* left the group"):
            group.barrier()
        return None

    ranks.run(3, body)


def test_a_transfer_moves_while_its_rank_computes(ranks: Ranks) -> None:
    """Nobody calls `wait`: the helpers alone fill the buffers."""

    def body(group: CollectiveGroup) -> object:
        peer = 1 - group.rank
        sent = torch.full((2_000_000,), 3.0 + group.rank)
        for received in (group.buffer_like(sent).zero_(), torch.zeros_like(sent)):
            handle = group.post([sent], peer, [received], peer)
            end = time.monotonic() + WAIT_S
            a = torch.ones(64, 64)
            while received[-1] != 3.0 + peer:
                assert time.monotonic() < end, "the transfer makes no progress on its own"
                a = (a @ a).clamp(0, 1)
            assert bool((received == 3.0 + peer).all())
            handle.wait()
            group.barrier()
        return None

    ranks.run(2, body)


def test_descriptors_and_mappings_return_to_where_they_began(ranks: Ranks, tmp_path: Path) -> None:
    """Groups come and go in one process, some of them broken."""

    def counts() -> tuple[int, int, int]:
        mapped = Path("/proc/self/maps").read_text().count("anabranch-group")
        return len(os.listdir("/proc/self/fd")), mapped, threading.active_count()

    def body(group: CollectiveGroup) -> object:
        group.barrier()
        before = counts()
        for turn in range(12):
            sub = group.split(0)
            x = torch.ones(200_000)
            y = sub.buffer_like(x)
            handle = sub.post([x], 1 - group.rank, [y], 1 - group.rank)
            if turn % 3:
                handle.wait()
            if turn % 4 == 3:
                group.barrier()
                sub.abort("broken on purpose")
            sub.close()
            sub.close()
            if turn % 3:
                assert bool((y == 1).all()), "a buffer outlives its group"
            with pytest.raises(PeerLost, match="closed"):
                sub.barrier()
            del sub, x, y, handle
            group.barrier()
        assert counts() == before
        return None

    named_before = names_in_shm()
    ranks.run(2, body)
    assert names_in_shm() == named_before
    assert sorted(path.name for path in ranks.meeting.iterdir()) == ["outcome-0", "outcome-1"]


def test_nothing_is_left_when_all_are_killed(ranks: Ranks) -> None:
    def body(group: CollectiveGroup) -> object:
        buffer = group.buffer_like(torch.ones(1_000_000)).fill_(1)
        group.post([buffer], 1 - group.rank, [group.buffer_like(buffer)], 1 - group.rank)
        group.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    named_before = names_in_shm()
    ranks.start(2, body)
    assert {outcome.signal for outcome in ranks.wait()} == {signal.SIGKILL}
    assert names_in_shm() == named_before
    assert list(ranks.meeting.iterdir()) == []


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_never_comes_is_named(tmp_path: Path, absent: int) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(DeadlineExceeded, match=f"rank {absent}"):
        create_group("shm", rank=1 - absent, size=2, rendezvous=tmp_path, start_timeout_s=0.3)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_ranks_ticket_is_passed_over(ranks: Ranks) -> None:
    """What an earlier attempt left in the folder does not lead anybody astray."""
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    stale = msgspec.msgpack.encode(Ticket(pid=dead, fd=3, token=b"0" * 16))
    wrong = msgspec.msgpack.encode(Ticket(pid=os.getpid(), fd=1, token=b"0" * 16))
    for ticket in (stale, wrong, b"garbage"):
        ranks.start(2, lambda group: group.all_gather(torch.tensor([group.rank]), 0).tolist(), ranks=range(1, 2))
        (ranks.meeting / "world.shm").write_bytes(ticket)
        ranks.start_late(0)
        assert [outcome.value for outcome in ranks.wait()] == [[0, 1], [0, 1]]


def test_an_open_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="0700"):
        create_group("shm", rank=0, size=1, rendezvous=tmp_path)
    with pytest.raises(ConfigError, match="rendezvous"):
        create_group("gloo", rank=0, size=1, rendezvous=tmp_path / "none")
    with pytest.raises(ConfigError, match="one of auto, shm"):
        create_group("mpi", rank=0, size=1, rendezvous=tmp_path)
