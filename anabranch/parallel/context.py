"""Where a rank stands in its worker's mesh, and whom it computes with."""

from __future__ import annotations

from dataclasses import dataclass, field

from anabranch.parallel.exchange import Exchange
from anabranch.parallel.group import Group, SingleRank
from anabranch.parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """One rank.

    Attributes:
        tp: ranks that share its layers.
        cp: ranks that share its sequences' tokens; None where there is one.
        world: all ranks of the mesh.
    """

    mesh: Mesh = field(default_factory=Mesh)
    rank: int = 0
    tp: Group = field(default_factory=SingleRank)
    cp: Exchange | None = None
    world: Group = field(default_factory=SingleRank)

    @property
    def tp_rank(self) -> int:
        return self.mesh.tp_rank(self.rank)

    @property
    def cp_rank(self) -> int:
        return self.mesh.cp_rank(self.rank)

    @property
    def drives(self) -> bool:
        """Whether this rank samples and schedules."""
        return self.rank == 0
