"""All ranks of a worker as one: the driving rank in this process, the others behind their group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import msgspec

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine, build_engine
from anabranch.engine.plan import StepPlan, StepResult
from anabranch.engine.warm_up import warm_up_plans
from anabranch.errors import WorkerDied
from runtime.rank_group import RankGroup

Command = TypeVar("Command", bound=msgspec.Struct)
Event = TypeVar("Event", bound=msgspec.Struct)
_Handled = TypeVar("_Handled", contravariant=True)


class Rank(Protocol[_Handled]):
    """What a room runs on every rank."""

    def handle(self, command: _Handled) -> None:
        """Obey a command."""
        ...

    def step(self, plan: StepPlan) -> StepResult:
        """Compute this rank's part of a step."""
        ...

    def close(self) -> None: ...


class Ranks(Generic[Command, Event]):
    """Commands go to every rank in the order of sending; what ranks report goes to `heard`.

    Args:
        module: what `python -m` runs for a rank other than the first.
        event_type: `tuple[int, union of the room's events]`.
        make_rank: makes the driving rank of a loaded engine; it reports through the given callable.
        make_step: the room's command for a step.
        heard: takes `(rank, event)`, from any thread.
        on_failure: hears that the ranks cannot go on.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        module: str,
        event_type: type[tuple[int, Event]],
        make_rank: Callable[[WorkerConfig, Engine, Callable[[Event], None]], Rank[Command]],
        make_step: Callable[[StepPlan], Command],
        heard: Callable[[int, Event], None],
        on_failure: Callable[[WorkerDied], None],
    ) -> None:
        self._config = config
        self._make_rank = make_rank
        self._make_step = make_step
        self._heard = heard
        self._group = RankGroup[Command, Event](config, module, event_type, heard, on_failure)
        self._local: Rank[Command] | None = None

    @property
    def size(self) -> int:
        return self._group.size

    def start(self) -> Engine:
        """Start, join, load and warm up all ranks. Blocking."""
        engine = build_engine(self._config, self._group.start())
        self._local = self._make_rank(self._config, engine, lambda event: self._heard(0, event))
        self._group.wait_ready()
        for plan in warm_up_plans(engine, self._config.role):
            self.step(plan)
        return engine

    def step(self, plan: StepPlan) -> StepResult:
        """Compute a step on all ranks."""
        assert self._local is not None
        self._group.send(self._make_step(plan))
        return self._local.step(plan)

    def send(self, command: Command) -> None:
        """Give all ranks a command."""
        assert self._local is not None
        self._group.send(command)
        self._local.handle(command)

    def close(self) -> None:
        self._group.close()
        if self._local is not None:
            self._local.close()
