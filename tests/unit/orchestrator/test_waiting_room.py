"""How many wait for their first token, and how much memory they take."""

from __future__ import annotations

import pytest

from anabranch.errors import Overloaded
from anabranch_client.v1 import anabranch_pb2 as pb
from orchestrator.waiting_room import TOKEN_BYTES, WaitingRoom, message_bytes

pytestmark = pytest.mark.unit


def held(room: WaitingRoom) -> tuple[int, int]:
    return room.num_places, room.num_bytes


def test_places_and_bytes_are_given_back_once() -> None:
    room = WaitingRoom(8, 10_000)
    first, second = room.enter(100), room.enter(50)
    first.hold_tokens(10)
    assert held(room) == (2, 150 + 10 * TOKEN_BYTES)
    first.leave()
    first.leave()
    assert held(room) == (1, 50)
    second.leave()
    assert held(room) == (0, 0)


def test_a_full_room_refuses_and_changes_nothing() -> None:
    room = WaitingRoom(2, 1000)
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
    room = WaitingRoom(2, 10)
    alone = room.enter(1_000_000)
    alone.hold_tokens(1000)
    with pytest.raises(Overloaded):
        room.enter(1)


def test_what_is_not_known_of_a_message_counts_too() -> None:
    message = pb.GenerateRequest.FromString(
        pb.GenerateRequest(text="x").SerializeToString() + b"\xfa\x01\x64" + b"?" * 100
    )
    assert message_bytes(message) >= 200
