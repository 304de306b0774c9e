"""The mesh of a worker's ranks: a tensor-parallel and a context-parallel axis. Arithmetic only.

Rank order is `rank = cp_rank * tp + tp_rank`, as in `KvLayout`, so neighbours on the tensor-parallel axis,
which speak most often, are neighbours on the machine.
"""

from __future__ import annotations

import msgspec

from anabranch.errors import ConfigError
from anabranch.parallel.split import check_tp

MAX_RANKS = 64


class Mesh(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker's `tp x cp` ranks.

    Attributes:
        tp: tensor-parallel degree: ranks that share a layer's heads and features.
        cp: context-parallel degree: ranks that share a prompt's tokens.

    Raises:
        ConfigError: a degree below 1, or more than MAX_RANKS ranks.
    """

    tp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        for key, degree in (("tp", self.tp), ("cp", self.cp)):
            if degree < 1:
                raise ConfigError(key, degree, "must be at least 1")
        if self.world_size > MAX_RANKS:
            raise ConfigError(
                "tp x cp", f"{self.tp} x {self.cp}", f"makes {self.world_size} ranks; at most {MAX_RANKS} are allowed"
            )

    @property
    def world_size(self) -> int:
        return self.tp * self.cp

    def tp_rank(self, rank: int) -> int:
        return self._known(rank) % self.tp

    def cp_rank(self, rank: int) -> int:
        return self._known(rank) // self.tp

    def _known(self, rank: int) -> int:
        assert 0 <= rank < self.world_size, (rank, self)
        return rank


def rank_devices(mesh: Mesh, device: str, num_devices: int) -> tuple[str, ...]:
    """Each rank's device: all ranks share `cpu`; on accelerators each has its own.

    Args:
        device: cpu, or an accelerator such as `cuda` or `cuda:2` (the first rank's).
        num_devices: accelerators that are visible; not looked at for cpu.

    Raises:
        ConfigError: fewer accelerators than ranks (collectives refuse two ranks on one).
    """
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return (device,) * mesh.world_size
    first = int(index or 0)
    if first + mesh.world_size > num_devices:
        raise ConfigError(
            "tp x cp",
            f"{mesh.tp} x {mesh.cp}",
            f"needs {mesh.world_size} devices from {kind}:{first} on, but {num_devices} are visible; "
            "lower the degrees or give the worker more devices",
        )
    return tuple(f"{kind}:{first + rank}" for rank in range(mesh.world_size))


def check_model(mesh: Mesh, *, num_heads: int, intermediate_size: int) -> None:
    """Raise ConfigError where a rank would hold no query head or no FFN feature; uneven shares are fine."""
    check_tp(mesh.tp, num_heads, intermediate_size)
