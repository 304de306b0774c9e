"""What happens to one request, in order, and how long it may take for something to happen."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from anabranch.errors import AnabranchError, DeadlineExceeded
from anabranch.protocol.workers import Ended, Paused, PrefillEnded, Reserved
from anabranch.request.token import Token
from orchestrator.attempt import Attempt
from orchestrator.membership import Member

FromWorker = Reserved | Paused | PrefillEnded | Ended | tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Assigned:
    """The queue has found a route."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Said:
    """A worker said something about the request."""

    member: Member
    message: FromWorker


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker is gone."""

    member: Member
    error: AnabranchError


@dataclass(frozen=True, slots=True)
class Stop:
    """Somebody ends the request."""

    error: AnabranchError


class Inbox:
    """Events of one request; anybody on the event loop puts, its one task takes."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Assigned | Said | Lost | Stop] = asyncio.Queue()
        self._deadline = 0.0
        self._what = ""

    def put(self, event: Assigned | Said | Lost | Stop) -> None:
        self._events.put_nowait(event)

    def allow(self, name: str, timeout_s: float, state: str) -> None:
        """Let events take `timeout_s` from now; `name` is the timeout's, for the error."""
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._what = f"{name}: nothing for {timeout_s:g} s while {state}"

    async def next(self) -> Assigned | Said | Lost:
        """The next event. Raises DeadlineExceeded once the allowed time is over, and what a Stop carries."""
        try:
            async with asyncio.timeout_at(self._deadline):
                event = await self._events.get()
        except TimeoutError:
            raise DeadlineExceeded(self._what) from None
        if isinstance(event, Stop):
            raise event.error
        return event
