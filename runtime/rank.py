"""What a room runs on each of its ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar, runtime_checkable

import msgspec

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine, build_engine
from anabranch.engine.pending import PendingResult
from anabranch.model.config import ModelConfig
from anabranch.parallel.context import RankContext
from anabranch.step.plan import StepPlan

ADVANCE_S = 1e-3

Command = TypeVar("Command", bound=msgspec.Struct)
Event = TypeVar("Event", bound=msgspec.Struct)
Done = Callable[[PendingResult | Exception], None]
_Handled = TypeVar("_Handled", contravariant=True)


class Follower(Protocol[_Handled]):
    """A rank that does what it is told; one thread calls."""

    def handle(self, command: _Handled) -> None:
        """Obey a command."""
        ...

    def close(self) -> None: ...


class Rank(Follower[_Handled], Protocol[_Handled]):
    """One rank of a worker that computes steps; one thread calls."""

    def step(self, plan: StepPlan) -> PendingResult:
        """Compute this rank's part of a step; a GPU may go on with it when this returns."""
        ...


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


class FollowerRoom(Protocol[Command, Event]):
    """What ranks other than the first need of their room.

    Attributes:
        module: what `python -m` runs for one of them.
        commands: decodes the room's commands.
        events: decodes `(rank, event)`.
    """

    @property
    def module(self) -> str: ...

    @property
    def commands(self) -> msgspec.msgpack.Decoder[Command]: ...

    @property
    def events(self) -> msgspec.msgpack.Decoder[tuple[int, Event]]: ...

    def follow(
        self, config: WorkerConfig, context: RankContext, model: ModelConfig, emit: Callable[[Event], None]
    ) -> Follower[Command]:
        """Load, and make the rank.

        Args:
            config: the rank's.
            emit: takes what it reports, from any thread.
        """
        ...


class RankRoom(msgspec.Struct, Generic[Command, Event], frozen=True, kw_only=True):
    """What ranks of a room that computes steps have in common; a `FollowerRoom`.

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

    def follow(
        self, config: WorkerConfig, context: RankContext, model: ModelConfig, emit: Callable[[Event], None]
    ) -> Follower[Command]:
        """See `FollowerRoom.follow`."""
        return self.make_rank(config, build_engine(config, context, model), emit)
