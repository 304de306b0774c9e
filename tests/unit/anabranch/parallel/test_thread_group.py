"""Ranks as threads: what fails on one rank ends all, and nothing waits for ever.

What they compute is tested together with the ranks that are processes, in tests/distributed/collectives.
"""

from __future__ import annotations

import threading

import pytest
import torch

from anabranch.errors import DeadlineExceeded, PeerLost, TransportError
from anabranch.parallel.exchange import Exchange
from anabranch.parallel.group import Group
from anabranch.parallel.threads import ThreadGroup, run_ranks
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.unit


def test_a_thread_group_is_a_group_and_an_exchange() -> None:
    def body(group: ThreadGroup) -> tuple[int, int]:
        as_group: Group = group
        as_exchange: Exchange = group
        return as_group.rank, as_exchange.size

    assert run_ranks(3, body) == [(0, 3), (1, 3), (2, 3)]


def test_the_first_failure_is_raised_and_ends_the_others() -> None:
    ends: list[str] = []

    def body(group: ThreadGroup) -> None:
        if group.rank == 1:
            raise ZeroDivisionError("in the model")
        try:
            group.split(0).barrier()
        except PeerLost as error:
            ends.append(str(error))
            raise

    with pytest.raises(ZeroDivisionError, match="in the model"):
        run_ranks(3, body)
    assert ends == ["rank 1 failed: ZeroDivisionError: in the model"] * 2


def test_a_failure_reaches_subgroups() -> None:
    def body(group: ThreadGroup) -> None:
        sub = group.split(group.rank % 2)
        if group.rank == 3:
            raise ValueError("rank 3")
        sub.barrier()
        group.barrier()

    with pytest.raises(ValueError, match="rank 3"):
        run_ranks(4, body)


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(DeadlineExceeded, match=r"all_reduce of ranks 1 .* collective_timeout_s = 0.05"):
        run_ranks(2, lambda group: group.rank or group.all_reduce(torch.ones(1)), collective_timeout_s=0.05)
    with pytest.raises(DeadlineExceeded, match="transfer from rank 1 to rank 0"):
        run_ranks(
            2,
            lambda group: group.rank or group.post([], 1, [torch.ones(1)], 1).wait(),
            collective_timeout_s=0.05,
        )


def test_a_rank_that_never_ends_is_given_up() -> None:
    release, ended = threading.Event(), threading.Event()

    def body(group: Group) -> object:
        if group.rank:
            release.wait(WAIT_S)
            ended.set()
        return None

    with pytest.raises(DeadlineExceeded, match=r"rank-1 still run after deadline_s = 0.1"):
        run_ranks(2, body, deadline_s=0.1)
    assert not ended.is_set()
    release.set()


def test_ranks_that_disagree_are_told() -> None:
    def body(group: ThreadGroup) -> None:
        if group.rank:
            group.barrier()
        else:
            group.all_reduce(torch.ones(1))

    with pytest.raises(TransportError, match="ranks disagree"):
        run_ranks(2, body)

    def transfer(group: ThreadGroup) -> None:
        peer = 1 - group.rank
        group.post([torch.ones(3 + group.rank)], peer, [torch.ones(3 + group.rank)], peer).wait()

    with pytest.raises(TransportError, match=r"sends \d+ bytes where rank \d expects"):
        run_ranks(2, transfer)


def test_what_was_sent_may_be_changed_after_wait_by_its_owner_alone() -> None:
    def body(group: ThreadGroup) -> list[float]:
        x = torch.full((3,), float(group.rank))
        received = torch.empty(3)
        handle = group.post([x], 1 - group.rank, [received], 1 - group.rank)
        handle.wait()
        x.fill_(-1)
        group.barrier()
        return received.tolist()

    assert run_ranks(2, body) == [[1.0] * 3, [0.0] * 3]


def test_abort_is_for_good() -> None:
    def body(group: ThreadGroup) -> None:
        group.abort("drained")
        for call in (group.barrier, lambda: group.post([torch.ones(1)], 0, [], 0)):
            with pytest.raises(PeerLost, match="drained"):
                call()

    run_ranks(2, body)
