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
        super().__init__(config, ROOM, heard, on_failure)
        self._reports = AllReports[PrefillEvent](self.size, StreamOpened, StreamAcknowledged)

    def send(self, command: PrefillCommand) -> None:
        if isinstance(command, OpenStream):
            self._reports.expect(command.key)
        elif isinstance(command, EndStream):
            self._reports.forget(command.key)
        super().send(command)

    def gather(self, rank: int, event: PrefillEvent) -> PrefillEvent | None:
        """The news of the whole stream that a rank's news completes; a failure of one is a failure of all."""
        if isinstance(event, StreamFailed):
            return event
        reports = self._reports.add(event.key, rank, event)
        if reports is None:
            return None
        stats = [report.stats for report in reports if isinstance(report, StreamAcknowledged)]
        return StreamAcknowledged(key=event.key, stats=joined_stats(stats)) if stats else event


def joined_stats(parts: list[KvStreamStats]) -> KvStreamStats:
    """One stream's figures from those of its ranks, which sent at the same time."""
    return KvStreamStats(
        payload_bytes=sum(part.payload_bytes for part in parts),
        transport="+".join(dict.fromkeys(part.transport for part in parts)),
        stream_s=max(part.stream_s for part in parts),
        exposed_s=max(part.exposed_s for part in parts),
    )
