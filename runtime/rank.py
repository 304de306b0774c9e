"""What a room runs on each of its ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar, runtime_checkable

import msgspec

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine
from anabranch.engine.pending import PendingResult
from anabranch.step.plan import StepPlan

ADVANCE_S = 1e-3

Command = TypeVar("Command", bound=msgspec.Struct)
Event = TypeVar("Event", bound=msgspec.Struct)
Done = Callable[[PendingResult | Exception], None]
_Handled = TypeVar("_Handled", contravariant=True)


class Rank(Protocol[_Handled]):
    """One rank; one thread calls."""

    def handle(self, command: _Handled) -> None:
        """Obey a command."""
        ...

    def step(self, plan: StepPlan) -> PendingResult:
        """Compute this rank's part of a step; a GPU may go on with it when this returns."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class LanedRank(Protocol):
    """A rank whose steps wait for other processes on their way, and that computes those of other lanes meanwhile."""

    @property
    def busy(self) -> bool:
        """Whether there is something to `advance`, without another command."""
        ...

    def begin(self, plan: StepPlan, done: Done) -> None:
        """Compute this rank's part of a step, by `advance`; `done` is called with the result or the error."""
        ...

    def advance(self) -> None:
        """Go on with a step as far as it goes by itself; where none can go on, wait, but not longer than ADVANCE_S."""
        ...


class RankRoom(msgspec.Struct, Generic[Command, Event], frozen=True, kw_only=True):
    """What ranks of a room have in common.

    Attributes:
        module: what `python -m` runs for a rank other than the first.
        commands: decodes the room's commands.
        events: decodes `(rank, event)`.
        make_step: the room's command for a step.
        make_rank: makes the rank of a loaded engine; it reports through the given callable, from any thread.
    """

    module: str
    commands: msgspec.msgpack.Decoder[Command]
    events: msgspec.msgpack.Decoder[tuple[int, Event]]
    make_step: Callable[[StepPlan], Command]
    make_rank: Callable[[WorkerConfig, Engine, Callable[[Event], None]], Rank[Command]]
