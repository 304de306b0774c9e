"""All ranks of a decode worker as one: commands go to each, and a stream's news counts once all have said it."""

from __future__ import annotations

from collections.abc import Callable

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine, build_engine
from anabranch.engine.plan import StepPlan, StepResult
from anabranch.errors import WorkerDied
from decode.commands import (
    CloseStream,
    DecodeCommand,
    DecodeEvent,
    RankListens,
    Step,
    StreamCommitted,
    StreamOpened,
)
from decode.rank import DecodeRank
from runtime.quorum import Quorum
from runtime.rank_group import RankGroup


class DecodeRanks:
    """The driving rank in this process, and the others behind their group.

    Args:
        emit: takes `(rank, event)`, from any thread; hand them to `gather` on the engine's thread.
        on_failure: hears that the ranks cannot go on.
    """

    def __init__(
        self,
        config: WorkerConfig,
        emit: Callable[[int, DecodeEvent], None],
        on_failure: Callable[[WorkerDied], None],
    ) -> None:
        self._config = config
        self._emit = emit
        self._group = RankGroup[DecodeCommand, DecodeEvent](
            config, "decode.rank", tuple[int, DecodeEvent], self._heard, on_failure
        )
        self._listening: dict[int, dict[str, str]] = {}
        self._opened = Quorum[StreamOpened](self._group.size)
        self._committed = Quorum[StreamCommitted](self._group.size)
        self._local: DecodeRank | None = None

    @property
    def addresses(self) -> tuple[dict[str, str], ...]:
        """For each rank, plane name -> address; complete once `start` has returned."""
        return tuple(self._listening[rank] for rank in sorted(self._listening))

    def start(self) -> Engine:
        """Start, join and load all ranks. Blocking."""
        engine = build_engine(self._config, self._group.start())
        self._local = DecodeRank(self._config, engine, lambda event: self._heard(0, event))
        self._group.wait_ready()
        return engine

    def step(self, plan: StepPlan) -> StepResult:
        """Compute a step on all ranks."""
        assert self._local is not None
        self._group.send(Step(plan=plan))
        return self._local.step(plan)

    def send(self, command: DecodeCommand) -> None:
        """Give all ranks a command."""
        assert self._local is not None
        if isinstance(command, CloseStream):
            self._opened.forget(command.stream_id)
            self._committed.forget(command.stream_id)
        self._group.send(command)
        self._local.handle(command)

    def gather(self, rank: int, event: DecodeEvent) -> DecodeEvent | None:
        """The news of the whole stream that a rank's news completes; a failure of one is a failure of all."""
        match event:
            case StreamOpened(stream_id=stream_id):
                return event if self._opened.add(stream_id, rank, event) is not None else None
            case StreamCommitted(stream_id=stream_id):
                return event if self._committed.add(stream_id, rank, event) is not None else None
            case _:
                return event

    def close(self) -> None:
        self._group.close()
        if self._local is not None:
            self._local.close()

    def _heard(self, rank: int, event: DecodeEvent) -> None:
        # A rank says where it listens before it says that it is ready, on the same socket.
        if isinstance(event, RankListens):
            self._listening[rank] = event.addresses
        else:
            self._emit(rank, event)
