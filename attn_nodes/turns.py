"""Which lane goes on next: the same one on all ranks of a mesh, for they meet in collectives on the way."""

from __future__ import annotations

import torch

from anabranch.parallel.group import Group

NOBODY = -1


class Turns:
    """The first rank decides, the others are told.

    Args:
        world: all ranks of the mesh.
    """

    def __init__(self, world: Group) -> None:
        self._world = world

    @property
    def decides(self) -> bool:
        return self._world.rank == 0

    def agree(self, lane: int) -> int:
        """The lane that goes on, or NOBODY; every rank calls it as often as the others.

        Args:
            lane: what the first rank has decided; of the others it is not looked at.

        Raises:
            PeerLost, DeadlineExceeded: another rank is gone or late.
        """
        if self._world.size == 1:
            return lane
        return int(self._world.all_gather(torch.tensor([lane]), 0)[0])
