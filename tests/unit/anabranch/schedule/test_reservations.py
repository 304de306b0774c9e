"""Reservations: blocks first, in order of arrival, and back again whatever happens."""

from __future__ import annotations

import pytest

from anabranch.cache.kv_manager import KvCacheManager
from anabranch.cache.lease import LeaseBook
from anabranch.schedule.reservations import Reservations
from tests.support.schedules import sequence

pytestmark = pytest.mark.unit


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make(num_blocks: int = 6) -> tuple[Reservations, Clock]:
    clock = Clock()
    cache = KvCacheManager(num_blocks=num_blocks, block_size=4, prefix_cache=False)
    return Reservations(cache, LeaseBook(clock=clock), lease_s=5.0), clock


def names(reservations: Reservations) -> list[str]:
    return [reservation.sequence.request.request_id for reservation in reservations.admit(8)]


def test_room_for_the_prompt_and_its_first_token() -> None:
    reservations, _ = make()
    reservations.add(sequence("a", 8))
    (reservation,) = reservations.admit(8)
    assert len(reservation.lease.table) == 3
    assert (reservations.num_leases, len(reservations)) == (1, 1)
    assert reservations.cache.pool.num_free == 3


def test_the_queue_is_served_in_order_and_nobody_overtakes() -> None:
    reservations, _ = make()
    for name, length in (("a", 8), ("b", 12), ("c", 3)):
        reservations.add(sequence(name, length))
    assert names(reservations) == ["a"]
    assert names(reservations) == []
    reservations.abort(reservations.streams()[0])
    assert names(reservations) == ["b", "c"]


def test_an_attempt_that_goes_on_is_served_before_those_that_never_ran() -> None:
    reservations, _ = make()
    reservations.add(sequence("new", 4))
    reservations.add(sequence("old", 4, output=(1,), epoch=1))
    assert names(reservations) == ["old", "new"]


def test_commit_gives_the_sequence_with_its_blocks_once() -> None:
    reservations, _ = make()
    item = sequence("a", 8)
    reservations.add(item)
    (reservation,) = reservations.admit(8)
    stream_id = reservation.lease.stream_id
    assert reservations.commit(stream_id) is item
    assert item.table is not None
    assert reservations.commit(stream_id) is None
    assert reservations.abort(stream_id) is None
    assert (len(reservations), reservations.cache.pool.num_free) == (0, 3)


def test_abort_frees_the_blocks_once() -> None:
    reservations, _ = make()
    item = sequence("a", 8)
    reservations.add(item)
    (reservation,) = reservations.admit(8)
    stream_id = reservation.lease.stream_id
    assert reservations.abort(stream_id) is item
    assert reservations.abort(stream_id) is None
    assert reservations.commit(stream_id) is None
    assert reservations.cache.pool.num_free == 6
    reservations.cache.check_integrity()


def test_an_attempt_is_found_while_it_waits_and_while_it_is_leased() -> None:
    reservations, _ = make(num_blocks=3)
    for name in "ab":
        reservations.add(sequence(name, 8))
    assert names(reservations) == ["a"]
    (stream_id,) = reservations.streams()
    assert (reservations.find(("a", 0)), reservations.find(("b", 0)), reservations.find(("a", 1))) == (
        stream_id,
        None,
        None,
    )
    assert ("a", 0) in reservations
    assert ("b", 0) in reservations
    assert ("c", 0) not in reservations
    assert reservations.forget_waiting(("a", 0)) is None
    assert reservations.forget_waiting(("b", 0)) is not None
    assert ("b", 0) not in reservations


def test_slices_let_a_lease_last_and_a_late_one_changes_nothing() -> None:
    reservations, clock = make()
    reservations.add(sequence("a", 8))
    (reservation,) = reservations.admit(8)
    stream_id = reservation.lease.stream_id
    clock.now_s = 4.0
    reservations.touch(stream_id)
    clock.now_s = 8.9
    assert reservations.leases.expired() == []
    clock.now_s = 9.1
    reservations.touch(stream_id)
    assert [lease.stream_id for lease in reservations.leases.expired()] == [stream_id]
    reservations.abort(stream_id)
    reservations.touch(stream_id)
    assert reservations.get(stream_id) is None
