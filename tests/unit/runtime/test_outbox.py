"""What waits to be sent: in order, and no more than there is room for."""

from __future__ import annotations

import pytest

from anabranch.errors import Overloaded
from runtime.outbox import Outbox

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("max_messages", "max_bytes"), [(3, 1000), (1000, 30)])
def test_it_is_full_in_messages_or_in_bytes(max_messages: int, max_bytes: int) -> None:
    rung: list[int] = []
    outbox = Outbox[str]("letters", lambda: rung.append(len(outbox)), max_messages=max_messages, max_bytes=max_bytes)
    for letter in "abc":
        outbox.put(letter, 10)
    assert rung == [1, 2, 3]
    with pytest.raises(Overloaded, match="letters: 3 messages of 30 bytes wait to be sent"):
        outbox.put("d", 10)
    assert outbox.take() == "a"
    outbox.put("d", 10)
    assert [outbox.take() for _ in range(4)] == ["b", "c", "d", None]
    assert len(outbox) == 0
