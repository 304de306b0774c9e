from __future__ import annotations

import threading

import pytest

from anabranch.cache.block_pool import BlockPool
from anabranch.cache.block_table import BlockTable
from anabranch.cache.lease import LeaseBook
from anabranch.errors import InvalidRequest, StaleLease
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> LeaseBook:
    return LeaseBook(clock)


def table() -> BlockTable:
    return BlockTable(BlockPool(1), 16)


def test_slices_keep_a_lease_alive(book: LeaseBook, clock: Clock) -> None:
    lease = book.open(("a", 0), table(), 10.0)
    assert book.deadline(lease.stream_id) == 110.0
    for _ in range(5):
        clock.now_s += 9.0
        assert book.touch(lease.stream_id, lease.generation) is lease
    assert book.deadline(lease.stream_id) == 155.0
    assert book.expired() == []
    assert book.commit(lease.stream_id) is lease
    assert len(book) == 0
    assert book.deadline(lease.stream_id) is None


def test_a_silent_lease_expires_and_refuses_late_slices_even_before_it_is_aborted(
    book: LeaseBook, clock: Clock
) -> None:
    slow = book.open(("slow", 0), table(), 10.0)
    quick = book.open(("quick", 0), table(), 5.0)
    clock.now_s = 109.999
    assert book.expired() == [quick]
    clock.now_s = 110.0
    assert book.expired() == [quick, slow]
    with pytest.raises(StaleLease, match=r"run out, no slice came for 10\.0 s"):
        book.touch(slow.stream_id, slow.generation)
    assert book.abort(slow.stream_id) is slow
    with pytest.raises(StaleLease, match="closed"):
        book.touch(slow.stream_id, slow.generation)
    assert book.expired() == [quick]


def test_expired_takes_any_moment(book: LeaseBook) -> None:
    lease = book.open(("a", 0), table(), 10.0)
    assert book.expired(109.0) == []
    assert book.expired(111.0) == [lease]


def test_a_wrong_generation_or_stream_is_stale_and_extends_nothing(book: LeaseBook, clock: Clock) -> None:
    lease = book.open(("a", 0), table(), 10.0)
    clock.now_s = 105.0
    with pytest.raises(StaleLease, match="generation"):
        book.touch(lease.stream_id, lease.generation - 1)
    with pytest.raises(StaleLease, match="closed"):
        book.touch(lease.stream_id + 1, lease.generation)
    assert book.deadline(lease.stream_id) == 110.0


def test_generations_differ_between_leases_and_between_books(clock: Clock) -> None:
    books = [LeaseBook(clock) for _ in range(3)]
    leases = [book.open((str(n), 0), table(), 1.0) for book in books for n in range(4)]
    assert len({lease.generation for lease in leases}) == 12


def test_closing_happens_once(book: LeaseBook) -> None:
    committed = book.open(("a", 0), table(), 10.0)
    book.commit(committed.stream_id)
    with pytest.raises(StaleLease):
        book.commit(committed.stream_id)
    assert book.abort(committed.stream_id) is None
    with pytest.raises(StaleLease):
        book.touch(committed.stream_id, committed.generation)


def test_complete_kv_can_be_committed_after_the_deadline_while_the_blocks_are_held(
    book: LeaseBook, clock: Clock
) -> None:
    lease = book.open(("a", 0), table(), 10.0)
    clock.now_s = 111.0
    assert book.commit(lease.stream_id) is lease


def test_an_attempt_is_reserved_once_and_found_by_its_key(book: LeaseBook) -> None:
    lease = book.open(("a", 0), table(), 10.0)
    assert book.find(("a", 0)) is lease
    assert book.find(("a", 1)) is None
    with pytest.raises(InvalidRequest, match="'a', epoch 0, is reserved already"):
        book.open(("a", 0), table(), 10.0)
    assert book.open(("a", 1), table(), 10.0).stream_id != lease.stream_id
    book.abort(lease.stream_id)
    assert book.find(("a", 0)) is None
    book.open(("a", 0), table(), 10.0)


def test_of_many_that_close_a_lease_at_once_one_gets_it(book: LeaseBook) -> None:
    for round_number in range(50):
        lease = book.open(("a", round_number), table(), 10.0)
        gate = threading.Barrier(4)
        won: list[object] = []

        def close(stream_id: int = lease.stream_id, gate: threading.Barrier = gate, won: list[object] = won) -> None:
            gate.wait(timeout=WAIT_S)
            won.append(book.abort(stream_id))

        threads = [threading.Thread(target=close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=WAIT_S)
        assert sorted(entry is lease for entry in won) == [False, False, False, True]
