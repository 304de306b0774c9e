"""How many wait for their first token, and how much memory they take."""

from __future__ import annotations

import pytest

from anabranch.errors import Overloaded
from anabranch_client.v1 import anabranch_pb2 as pb
from orchestrator.request_message import message_bytes
from orchestrator.shares import MAX_REFUSED, WANTS_S
from orchestrator.waiting_room import TOKEN_BYTES, Place, WaitingRoom

pytestmark = pytest.mark.unit


def held(room: WaitingRoom) -> tuple[int, int]:
    return room.num_places, room.num_bytes


def test_places_and_bytes_are_given_back_once() -> None:
    room = WaitingRoom(8, 10_000, 10_000)
    first, second = room.enter(100), room.enter(50)
    first.hold_tokens(10)
    assert held(room) == (2, 150 + 10 * TOKEN_BYTES)
    first.leave()
    first.leave()
    assert held(room) == (1, 50)
    second.leave()
    assert held(room) == (0, 0)


def test_a_full_room_refuses_and_changes_nothing() -> None:
    room = WaitingRoom(2, 1000, 1000)
    first = room.enter(600)
    with pytest.raises(Overloaded, match="take 600 bytes and this one 401 more, above the 1000 that max_queued_bytes"):
        room.enter(401)
    second = room.enter(400)
    with pytest.raises(Overloaded, match="2 requests wait for their first token, as many as max_queued"):
        room.enter(0)
    with pytest.raises(Overloaded, match="max_queued_bytes"):
        second.hold_tokens(1)
    assert held(room) == (2, 1000)
    first.leave()
    second.hold_tokens(1)
    assert held(room) == (1, 400 + TOKEN_BYTES)


def test_one_alone_is_never_too_large() -> None:
    room = WaitingRoom(2, 10, 10)
    alone = room.enter(1_000_000)
    alone.hold_tokens(1000)
    with pytest.raises(Overloaded):
        room.enter(1)


def test_what_is_not_known_of_a_message_counts_too() -> None:
    message = pb.GenerateRequest.FromString(
        pb.GenerateRequest(text="x").SerializeToString() + b"\xfa\x01\x64" + b"?" * 100
    )
    assert message_bytes(message) >= 200


def test_prompt_tokens_are_bounded() -> None:
    room = WaitingRoom(8, 1 << 30, 100)
    first, second = room.enter(1), room.enter(1)
    first.hold_tokens(60)
    with pytest.raises(Overloaded, match="have 60 prompt tokens and this one 41 more, above the 100 that max_que"):
        second.hold_tokens(41)
    second.hold_tokens(40)
    first.leave()
    second.leave()
    assert (room.num_places, room.num_bytes, room.num_tokens) == (0, 0, 0)
    alone = room.enter(1)
    alone.hold_tokens(1000)


class Room:
    """A room of 100 places, and as many tries as a test likes."""

    def __init__(self, **weights: float) -> None:
        self.now_s = 0.0
        self.room = WaitingRoom(100, 1 << 30, 1 << 30, lambda name: weights.get(name, 1.0), lambda: self.now_s)

    def enter(self, tenant: str, times: int, priority: int = 0) -> list[Place]:
        """The places of those that were let in."""
        found = []
        for _ in range(times):
            try:
                found.append(self.room.enter(0, tenant, priority))
            except Overloaded:
                continue
        return found


def test_one_tenant_alone_fills_the_room() -> None:
    assert len(Room().enter("a", 200)) == 100


def test_a_burst_finds_room_while_others_want_little() -> None:
    room = Room()
    for number in range(20):
        room.enter(f"t{number}", 1)
    assert len(room.enter("burst", 200)) == 40


def test_who_comes_to_a_full_room_gets_its_share_as_places_come_free() -> None:
    room = Room(gold=3.0)
    a = room.enter("a", 100)
    assert not room.enter("gold", 1)
    b: list[Place] = []
    while a and len(b) < 75:
        a.pop().leave()
        # The first to come does not get it.
        a += room.enter("a", 1)
        b += room.enter("gold", 1)
    assert (len(a), len(b)) == (25, 75)
    # Both go on wanting: it stays so.
    for _ in range(50):
        b.pop().leave()
        assert not room.enter("a", 1)
        b += room.enter("gold", 1)
    assert (len(a), len(b)) == (25, 75)


def test_who_was_refused_long_ago_wants_nothing() -> None:
    room = Room()
    a = room.enter("a", 100)
    room.enter("b", 1)
    a.pop().leave()
    with pytest.raises(Overloaded, match=r"the tenant 'a' has 99 requests .* beyond its share of the 100 that"):
        room.room.enter(0, "a")
    room.now_s += WANTS_S + 1
    assert room.enter("a", 1)


def test_names_of_refused_tenants_are_bounded_and_weigh_nothing_once_gone() -> None:
    room = Room()
    a = room.enter("a", 100)
    room.enter("b", 1)
    for number in range(3 * MAX_REFUSED):
        room.enter(f"x{number}", 1)
    assert len(room.room._wanting._refused) == MAX_REFUSED
    for place in a:
        place.leave()
    room.now_s += WANTS_S + 1
    assert room.room._wanting.share_of("new", room.now_s) == pytest.approx(1.0)
    assert (room.room.num_places, room.room._places._by_party) == (0, {})


def test_the_urgent_get_most_of_a_full_room_and_the_lowest_keep_a_place() -> None:
    room = Room()
    low = room.enter("a", 100, 5)
    urgent: list[Place] = []
    while low and len(urgent) < 99:
        low.pop().leave()
        low += room.enter("a", 1, 5)
        urgent += room.enter("a", 1, -5)
    assert (len(low), len(urgent)) == (1, 99)
    # Under a flood of urgent ones the lowest get their place again when it is free.
    low.pop().leave()
    assert not room.enter("a", 1, -5)
    with pytest.raises(Overloaded, match="99 requests of priority -5 wait for their first token; 1 more is beyond the"):
        room.room.enter(0, "a", -5)
    assert room.enter("a", 1, 5)
    # One step is worth twice the share.
    room = Room()
    room.enter("a", 100, 1)
    assert room.room._wanting_by_priority.share_of(0, 0.0) == pytest.approx(2 / 3)


def test_priorities_of_any_distance_weigh_nothing_once_gone() -> None:
    room = Room()
    places = [place for priority in (-100, 100, 0) for place in room.enter("a", 1, priority)]
    for place in places[::2]:
        place.leave()
    assert room.room._wanting_by_priority.share_of(100, 0.0) == 1.0
    places[1].leave()
    assert room.room._places_by_priority._by_party == {}
