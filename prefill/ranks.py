"""All ranks of a prefill worker as one: commands go to each, and a stream's news counts once all have said it."""

from __future__ import annotations

from collections.abc import Callable

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine, build_engine
from anabranch.engine.plan import StepPlan, StepResult
from anabranch.errors import WorkerDied
from anabranch.protocol.kv import KvStreamStats
from prefill.commands import (
    EndStream,
    PrefillCommand,
    PrefillEvent,
    Step,
    StreamAcknowledged,
    StreamFailed,
    StreamOpened,
)
from prefill.rank import PrefillRank
from runtime.quorum import Quorum
from runtime.rank_group import RankGroup


class PrefillRanks:
    """The driving rank in this process, and the others behind their group.

    Args:
        emit: takes `(rank, event)`, from any thread; hand them to `gather` on the engine's thread.
        on_failure: hears that the ranks cannot go on.
    """

    def __init__(
        self,
        config: WorkerConfig,
        emit: Callable[[int, PrefillEvent], None],
        on_failure: Callable[[WorkerDied], None],
    ) -> None:
        self._config = config
        self._emit = emit
        self._group = RankGroup[PrefillCommand, PrefillEvent](
            config, "prefill.rank", tuple[int, PrefillEvent], emit, on_failure
        )
        self._opened = Quorum[StreamOpened](self._group.size)
        self._acknowledged = Quorum[StreamAcknowledged](self._group.size)
        self._local: PrefillRank | None = None

    def start(self) -> Engine:
        """Start, join and load all ranks; warm them up. Blocking."""
        engine = build_engine(self._config, self._group.start())
        self._local = PrefillRank(self._config, engine, lambda event: self._emit(0, event))
        self._group.wait_ready()
        return engine

    def step(self, plan: StepPlan) -> StepResult:
        """Compute a step on all ranks."""
        assert self._local is not None
        self._group.send(Step(plan=plan))
        return self._local.step(plan)

    def send(self, command: PrefillCommand) -> None:
        """Give all ranks a command."""
        assert self._local is not None
        if isinstance(command, EndStream):
            self._opened.forget(command.key)
            self._acknowledged.forget(command.key)
        self._group.send(command)
        self._local.handle(command)

    def gather(self, rank: int, event: PrefillEvent) -> PrefillEvent | None:
        """The news of the whole stream that a rank's news completes; a failure of one is a failure of all."""
        match event:
            case StreamOpened(key=key):
                return event if self._opened.add(key, rank, event) is not None else None
            case StreamAcknowledged(key=key):
                reports = self._acknowledged.add(key, rank, event)
                if reports is None:
                    return None
                return StreamAcknowledged(key=key, stats=joined_stats([report.stats for report in reports]))
            case StreamFailed():
                return event

    def close(self) -> None:
        self._group.close()
        if self._local is not None:
            self._local.close()


def joined_stats(parts: list[KvStreamStats]) -> KvStreamStats:
    """One stream's figures from those of its ranks, which sent at the same time."""
    return KvStreamStats(
        payload_bytes=sum(part.payload_bytes for part in parts),
        transport="+".join(dict.fromkeys(part.transport for part in parts)),
        stream_s=max(part.stream_s for part in parts),
        exposed_s=max(part.exposed_s for part in parts),
    )
