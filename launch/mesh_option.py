"""Meshes on the command line: `2x1:1x3` puts a prefill pool of TP 2 before a decode pool of CP 3."""

from __future__ import annotations

import re

import msgspec

from anabranch.config.topology import PoolConfig, Topology
from anabranch.errors import ConfigError
from anabranch.parallel.mesh import Mesh

OPTION = "--mesh"


def with_meshes(topology: Topology, text: str) -> Topology:
    """A topology whose pools have other meshes.

    Args:
        text: TPxCP of the prefill and of the decode pool, as `2x1:1x3`; of the colocated pool, as `2x2`.

    Raises:
        ConfigError: no mesh, or not one for each pool.
    """
    pools = topology.pools
    names = [name for name in ("prefill", "decode", "colocated") if getattr(pools, name) is not None]
    parts = text.split(":")
    if len(parts) != len(names):
        raise ConfigError(OPTION, text, f"give TPxCP for each pool ({', '.join(names)}), with colons between")
    changed = {name: _with_mesh(getattr(pools, name), part, text) for name, part in zip(names, parts, strict=True)}
    return msgspec.structs.replace(topology, pools=msgspec.structs.replace(pools, **changed))


def _with_mesh(pool: PoolConfig, part: str, text: str) -> PoolConfig:
    degrees = re.fullmatch(r"(\d{1,6})x(\d{1,6})", part)
    if degrees is None:
        raise ConfigError(OPTION, text, f"{part!r} is no TPxCP such as 2x1")
    mesh = Mesh(tp=int(degrees[1]), cp=int(degrees[2]))
    return msgspec.structs.replace(pool, tp=mesh.tp, cp=mesh.cp)
