"""All ranks of a worker as one: the driving rank in this process, the others behind their group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine, build_engine
from anabranch.engine.fit import check_memory, check_worker, rank_config
from anabranch.engine.plan import StepPlan, StepResult
from anabranch.engine.warm_up import warm_up_plans
from anabranch.errors import WorkerDied
from anabranch.model.sources import resolve_model
from runtime.rank import Command, Event, Rank, RankRoom
from runtime.rank_group import RankGroup


class Ranks(Generic[Command, Event]):
    """Commands go to every rank in the order of sending; what ranks report goes to `heard`.

    Args:
        make_step: the room's command for a step.
        heard: takes `(rank, event)`, from any thread.
        on_failure: hears that the ranks cannot go on.
    """

    def __init__(
        self,
        config: WorkerConfig,
        room: RankRoom[Command, Event],
        *,
        make_step: Callable[[StepPlan], Command],
        heard: Callable[[int, Event], None],
        on_failure: Callable[[WorkerDied], None],
    ) -> None:
        self._config = config
        self._room = room
        self._make_step = make_step
        self._heard = heard
        self._group = RankGroup[Command, Event](config, room, heard, on_failure)
        self._local: Rank[Command] | None = None

    @property
    def size(self) -> int:
        return self._group.size

    def start(self) -> Engine:
        """Check that the ranks fit, then start, join, load and warm up all of them. Blocking.

        Raises:
            ConfigError: the mesh does not fit the model or the machine; nothing was started.
            ModelError: the model cannot be found, is not supported, or its files are broken.
            WorkerDied, DeadlineExceeded: a rank did not come up.
        """
        model = resolve_model(self._config.model).config()
        check_worker(self._config, model)
        check_memory([self._config], model)
        context = self._group.start(model)
        own = rank_config(self._config, 0)
        engine = build_engine(own, context, model)
        self._local = self._room.make_rank(own, engine, lambda event: self._heard(0, event))
        self._group.wait_ready()
        for plan in warm_up_plans(engine, self._config.role):
            self.step(plan)
        return engine

    def step(self, plan: StepPlan) -> StepResult:
        """Compute a step on all ranks.

        Raises:
            WorkerDied: one of several ranks could not; none can go on.
        """
        assert self._local is not None
        self._group.send(self._make_step(plan))
        try:
            return self._local.step(plan)
        except Exception as error:
            if self.size == 1:
                raise
            # The others wait in the step, or have gone on without this rank.
            raise self._group.broken(error) from error

    def send(self, command: Command) -> None:
        """Give all ranks a command."""
        assert self._local is not None
        self._group.send(command)
        self._local.handle(command)

    def close(self) -> None:
        self._group.close()
        if self._local is not None:
            self._local.close()
