"""All ranks of a worker as one: the driving rank in this process, the others behind their group."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic

from anabranch.config.worker import WorkerConfig
from anabranch.engine.activity import Activity
from anabranch.engine.build import Engine, build_engine
from anabranch.engine.fit import check_memory, check_worker, rank_config
from anabranch.engine.warm_up import warm_up_plans
from anabranch.errors import FfnUnavailable, WorkerDied
from anabranch.model.sources import resolve_model
from anabranch.step.plan import StepPlan, StepResult
from runtime.compute import ComputeThread, Launched
from runtime.rank import Command, Event, Rank, RankRoom
from runtime.rank_group import RankGroup

logger = logging.getLogger(__name__)

# Steps that warm up may compile; those of requests are watched with `step_stall_s`.
STEP_TIMEOUT_S = 600.0
CLOSE_TIMEOUT_S = 5.0


class Ranks(Generic[Command, Event]):
    """Commands go to every rank in the order of sending; what ranks report goes to `heard`.

    Args:
        heard: takes `(rank, event)`, from any thread.
        on_failure: called when the ranks cannot go on.
    """

    def __init__(
        self,
        config: WorkerConfig,
        room: RankRoom[Command, Event],
        heard: Callable[[int, Event], None],
        on_failure: Callable[[WorkerDied], None],
    ) -> None:
        self._config = config
        self._room = room
        self._heard = heard
        self._group = RankGroup[Command, Event](config, room, heard, on_failure)
        self._local: Rank[Command] | None = None
        self._compute: ComputeThread[Command] | None = None

    @property
    def size(self) -> int:
        return self._group.size

    @property
    def activity(self) -> Activity:
        """What the driving rank computes, once it has started."""
        assert self._compute is not None
        return self._compute.activity

    def start(self) -> Engine:
        """Check that the ranks fit, then start, join, load and warm up all of them. Blocking.

        Raises:
            ConfigError: the mesh does not fit the model or the machine; nothing was started.
            ModelError: the model cannot be found, is not supported, or its files are broken.
            WorkerDied, DeadlineExceeded: a rank did not come up.
        """
        model = resolve_model(self._config.model).config()
        check_worker(self._config, model)
        check_memory([self._config], model, {})
        context = self._group.start(model)
        own = rank_config(self._config, 0)
        engine = build_engine(own, context, model)
        self._local = self._room.make_rank(own, engine, lambda event: self._heard(0, event))
        self._compute = ComputeThread(self._local, own.threads, engine.runner.device, self._failed)
        self._group.wait_ready()
        for plan in warm_up_plans(engine, self._config.role):
            self.step(plan)
        return engine

    def step(self, plan: StepPlan) -> StepResult:
        """Compute a step on all ranks and wait for it.

        Raises:
            WorkerDied: one of several ranks could not; none can go on.
            DeadlineExceeded: it took longer than any step may.
        """
        return self.launch(plan).result(max(STEP_TIMEOUT_S, self._config.step_stall_s))

    def launch(self, plan: StepPlan) -> Launched:
        """Let all ranks compute a step after all that they have been sent before; does not wait for it."""
        assert self._compute is not None
        self._group.send(self._room.make_step(plan))
        return self._compute.launch(plan)

    def send(self, command: Command) -> None:
        """Give all ranks a command, to be obeyed after all that they have been sent before."""
        assert self._compute is not None
        self._group.send(command)
        self._compute.send(command)

    def close(self) -> None:
        # The other ranks first: this one may wait for them in a step, and then their end is what ends its wait.
        self._group.close()
        if self._compute is not None and not self._compute.stop(CLOSE_TIMEOUT_S):
            logger.warning("a step is still being computed after close_timeout_s = %s s", CLOSE_TIMEOUT_S)
        if self._local is not None:
            self._local.close()

    def _failed(self, error: Exception) -> Exception:
        # What all ranks know of has torn nothing.
        if self.size == 1 or isinstance(error, FfnUnavailable):
            return error
        # The others wait in the step, or have gone on without this rank.
        return self._group.broken(error)
