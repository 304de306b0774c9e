"""A prefill worker's ranks: a stream's news counts once all of them have said it."""

from __future__ import annotations

from collections.abc import Callable

from anabranch.config.worker import WorkerConfig
from anabranch.errors import WorkerDied
from anabranch.protocol.kv import KvStreamStats
from prefill.commands import (
    EndStream,
    OpenStream,
    PrefillCommand,
    PrefillEvent,
    Step,
    StreamAcknowledged,
    StreamFailed,
    StreamOpened,
)
from prefill.rank import ROOM
from runtime.all_reports import AllReports
from runtime.ranks import Ranks


class PrefillRanks(Ranks[PrefillCommand, PrefillEvent]):
    """See `Ranks`.

    Args:
        heard: takes `(rank, event)`, from any thread; hand them to `gather` on the engine's thread.
        on_failure: called when the ranks cannot go on.
    """

    def __init__(
        self,
        config: WorkerConfig,
        heard: Callable[[int, PrefillEvent], None],
        on_failure: Callable[[WorkerDied], None],
    ) -> None:
        super().__init__(
            config,
            ROOM,
            make_step=lambda plan: Step(plan=plan),
            heard=heard,
            on_failure=on_failure,
        )
        self._opened = AllReports[StreamOpened](self.size)
        self._acknowledged = AllReports[StreamAcknowledged](self.size)

    def send(self, command: PrefillCommand) -> None:
        if isinstance(command, OpenStream):
            self._opened.expect(command.key)
            self._acknowledged.expect(command.key)
        elif isinstance(command, EndStream):
            self._opened.forget(command.key)
            self._acknowledged.forget(command.key)
        super().send(command)

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


def joined_stats(parts: list[KvStreamStats]) -> KvStreamStats:
    """One stream's figures from those of its ranks, which sent at the same time."""
    return KvStreamStats(
        payload_bytes=sum(part.payload_bytes for part in parts),
        transport="+".join(dict.fromkeys(part.transport for part in parts)),
        stream_s=max(part.stream_s for part in parts),
        exposed_s=max(part.exposed_s for part in parts),
    )
