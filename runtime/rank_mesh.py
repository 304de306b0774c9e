"""The collectives of a worker's mesh, as one rank joins them."""

from __future__ import annotations

from pathlib import Path

import torch

from anabranch.config.worker import WorkerConfig
from anabranch.parallel.context import RankContext
from anabranch.parallel.group import Group, SingleRank
from anabranch.parallel.mesh import Mesh
from transport.collectives.backends import create_group
from transport.collectives.base import CollectiveGroup


def join_world(config: WorkerConfig, rank: int, folder: Path) -> CollectiveGroup:
    """The group of all ranks, each a process.

    Args:
        config: the rank's.
        folder: private, where the ranks meet.

    Raises:
        DeadlineExceeded: a rank did not come.
        TransportUnavailable: no collectives can be had here.
    """
    if config.device.startswith("cuda"):
        torch.cuda.set_device(config.device)  # NCCL's groups use the current one
    return create_group(
        config.collectives,
        rank=rank,
        size=config.tp * config.cp,
        rendezvous=folder,
        device=config.device,
        collective_timeout_s=config.collective_timeout_s,
    )


class RankMesh:
    """The world group, and the groups of this rank's axes; all ranks make theirs at the same time.

    Args:
        world: all ranks; closed with the mesh.
    """

    def __init__(self, world: CollectiveGroup, mesh: Mesh) -> None:
        rank = world.rank
        tp: Group = SingleRank()
        cp: CollectiveGroup | None = None
        self.world = world
        self._groups = [world]
        if mesh.tp > 1:
            tp_group = world.split(mesh.cp_rank(rank)) if mesh.cp > 1 else world
            self._groups.append(tp_group)
            tp = tp_group
        if mesh.cp > 1:
            cp = world.split(mesh.tp_rank(rank)) if mesh.tp > 1 else world
            self._groups.append(cp)
        self.context = RankContext(mesh=mesh, rank=rank, tp=tp, cp=cp, world=world)

    def abort(self, reason: str) -> None:
        """End every wait of every rank of these groups."""
        for group in self._groups:
            group.abort(reason)

    def close(self) -> None:
        for group in dict.fromkeys(self._groups):
            group.close()
