"""The ranks of a worker that generates: a stream's news counts once all of them have said it."""

from __future__ import annotations

from collections.abc import Callable

from anabranch.config.worker import WorkerConfig
from anabranch.errors import WorkerDied
from runtime.all_reports import AllReports
from runtime.generation.commands import (
    CloseStream,
    GenerationCommand,
    GenerationEvent,
    OpenStream,
    RankListens,
    StreamCommitted,
    StreamOpened,
)
from runtime.rank import RankRoom
from runtime.ranks import Ranks


class GenerationRanks(Ranks[GenerationCommand, GenerationEvent]):
    """See `Ranks`.

    Args:
        heard: takes `(rank, event)`, from any thread; hand them to `gather` on the engine's thread.
        on_failure: called when the ranks cannot go on.
    """

    def __init__(
        self,
        config: WorkerConfig,
        room: RankRoom[GenerationCommand, GenerationEvent],
        heard: Callable[[int, GenerationEvent], None],
        on_failure: Callable[[WorkerDied], None],
    ) -> None:
        super().__init__(config, room, self._note, on_failure)
        self._pass_on = heard
        self._listening: dict[int, RankListens] = {}
        self._reports = AllReports[GenerationEvent](self.size, StreamOpened, StreamCommitted)

    @property
    def addresses(self) -> tuple[dict[str, str], ...]:
        """For each rank, plane name -> address; complete once `start` has returned."""
        return tuple(self._listening[rank].addresses for rank in sorted(self._listening))

    @property
    def copy_bytes_per_s(self) -> float:
        """How fast the slowest rank copies blocks between pool and host memory; complete once `start` has returned."""
        return min(listening.copy_bytes_per_s for listening in self._listening.values())

    def send(self, command: GenerationCommand) -> None:
        if isinstance(command, OpenStream):
            self._reports.expect(command.stream_id)
        elif isinstance(command, CloseStream):
            self._reports.forget(command.stream_id)
        super().send(command)

    def gather(self, rank: int, event: GenerationEvent) -> GenerationEvent | None:
        """The news of the whole stream that a rank's news completes; a failure of one is a failure of all."""
        if isinstance(event, StreamOpened | StreamCommitted):
            return event if self._reports.add(event.stream_id, rank, event) is not None else None
        return event

    def _note(self, rank: int, event: GenerationEvent) -> None:
        # A rank says where it listens before it says that it is ready, on the same socket.
        if isinstance(event, RankListens):
            self._listening[rank] = event
        else:
            self._pass_on(rank, event)
