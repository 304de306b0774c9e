"""What happens to one request, in order, and how long it may take for something to happen.

What workers say is bounded: tokens that wait here are counted, and any other message as one token. A request takes its
events faster than an honest worker sends them, so a worker of which MAX_WAITING of them wait has failed the request.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from anabranch.errors import AnabranchError, DeadlineExceeded, MalformedMessage
from anabranch.protocol.workers import Ended, Preempted, PrefillEnded, Reserved
from anabranch.request.token import Token
from anabranch.system.clock import loop_clock, timeout_at
from orchestrator.attempt import Attempt
from orchestrator.member import Member

# Seconds' worth of one request's tokens at any speed, should this process be held up.
MAX_WAITING = 16384

FromWorker = Reserved | Preempted | PrefillEnded | Ended | tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Assigned:
    """There is a route."""

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
class Overran:
    """A worker sends more than can be taken in; nothing after this is kept."""

    member: Member
    error: AnabranchError


@dataclass(frozen=True, slots=True)
class Stop:
    """Somebody ends the request."""

    error: AnabranchError


class StageLate(DeadlineExceeded):
    """Nothing has happened for as long as the stage allows; not the deadline of the request's client."""


class Inbox:
    """Events of one request; anybody on the event loop puts, its one task takes.

    Attributes:
        attempt: the request's present one, whose workers alone are listened to; None while there is none. The task
            sets it to None when it is over.
    """

    def __init__(self) -> None:
        self.attempt: Attempt | None = None
        self._events: asyncio.Queue[Assigned | Said | Lost | Overran | Stop] = asyncio.Queue()
        self._num_waiting = 0
        self._overrun = False
        self._deadline = 0.0
        self._what = ""

    def assign(self, attempt: Attempt) -> None:
        """There is a route."""
        assert self.attempt is None
        self.attempt = attempt
        self._overrun = False
        self._events.put_nowait(Assigned(attempt))

    def said(self, member: Member, message: FromWorker) -> None:
        """A worker said something about the request."""
        if self._overrun or not self._listens_to(member):
            return
        event = Said(member, message)
        self._num_waiting += _weight(event)
        if self._num_waiting <= MAX_WAITING:
            self._events.put_nowait(event)
            return
        self._overrun = True
        self._num_waiting -= _weight(event)
        error = MalformedMessage(
            f"worker {member.name} sends faster than can be taken in: more than {MAX_WAITING} tokens and messages of "
            "one request wait"
        )
        self._events.put_nowait(Overran(member, error))

    def lost(self, member: Member, error: AnabranchError) -> None:
        """A worker is gone."""
        if self._listens_to(member):
            self._events.put_nowait(Lost(member, error))

    def stop(self, error: AnabranchError) -> None:
        """End the request with `error`, unless it has ended."""
        self._events.put_nowait(Stop(error))

    def _listens_to(self, member: Member) -> bool:
        return self.attempt is not None and member in self.attempt.route.members

    def allow(self, name: str, timeout_s: float, state: str) -> None:
        """Let events take `timeout_s` from now; `name` is the timeout's, for the error."""
        self._deadline = loop_clock().now() + timeout_s
        self._what = f"{name}: nothing for {timeout_s:g} s while {state}"

    async def next(self) -> Assigned | Said | Lost | Overran:
        """The next event. Raises StageLate once the allowed time is over, and what a Stop carries."""
        try:
            async with timeout_at(self._deadline):
                event = await self._events.get()
        except TimeoutError:
            raise StageLate(self._what) from None
        if isinstance(event, Stop):
            raise event.error
        if isinstance(event, Said):
            self._num_waiting -= _weight(event)
        return event


def _weight(event: Said) -> int:
    return max(1, len(event.message)) if isinstance(event.message, tuple) else 1
