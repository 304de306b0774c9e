"""The collectives of a worker's mesh, as one rank joins them."""

from __future__ import annotations

from pathlib import Path

from anabranch.config.worker import WorkerConfig
from anabranch.parallel.context import RankContext
from anabranch.parallel.group import Group, SingleRank
from anabranch.parallel.mesh import Mesh
from transport.collectives.base import CollectiveGroup
from transport.collectives.registry import create_group


def rank_cores(config: WorkerConfig, rank: int) -> tuple[int, ...]:
    """The CPU ids of a rank: the worker's, dealt out evenly; all of them where there are too few."""
    size = config.tp * config.cp
    share = len(config.cores) // size
    return config.cores[rank * share : (rank + 1) * share] if share else config.cores


class RankMesh:
    """The world group, and the groups of this rank's axes.

    Args:
        folder: private, where the ranks meet.

    Raises:
        DeadlineExceeded: a rank did not come.
        TransportUnavailable: no collectives can be had here.
    """

    def __init__(self, config: WorkerConfig, mesh: Mesh, rank: int, folder: Path) -> None:
        self.world: CollectiveGroup = create_group(
            config.collectives,
            rank=rank,
            size=mesh.world_size,
            rendezvous=folder,
            device=config.device,
            collective_timeout_s=config.collective_timeout_s,
        )
        tp: Group = SingleRank()
        cp: CollectiveGroup | None = None
        self._groups = [self.world]
        if mesh.tp > 1:
            tp_group = self.world.split(mesh.cp_rank(rank)) if mesh.cp > 1 else self.world
            self._groups.append(tp_group)
            tp = tp_group
        if mesh.cp > 1:
            cp = self.world.split(mesh.tp_rank(rank)) if mesh.tp > 1 else self.world
            self._groups.append(cp)
        self.context = RankContext(mesh=mesh, rank=rank, tp=tp, cp=cp)

    def abort(self, reason: str) -> None:
        """End every wait of every rank of these groups."""
        for group in self._groups:
            group.abort(reason)

    def close(self) -> None:
        for group in dict.fromkeys(self._groups):
            group.close()
