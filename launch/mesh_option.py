"""Meshes on the command line: `2x1:1x3` puts a prefill pool of TP 2 before a decode pool of CP 3."""

from __future__ import annotations

import re
from dataclasses import replace

from anabranch.config.topology import PoolConfig, Pools, Topology
from anabranch.errors import ConfigError

OPTION = "--mesh"


def with_meshes(topology: Topology, text: str) -> Topology:
    """A topology whose pools have other meshes.

    Args:
        text: TPxCP of the prefill and of the decode pool, as `2x1:1x3`; of the colocated pool, as `2x2`.

    Raises:
        ConfigError: no mesh, or not one for each pool.
    """
    pools = topology.pools.by_role
    parts = text.split(":")
    if len(parts) != len(pools):
        raise ConfigError(OPTION, text, f"give TPxCP for each pool ({', '.join(pools)}), with colons between")
    changed = {role: _with_mesh(pool, part, text) for (role, pool), part in zip(pools.items(), parts, strict=True)}
    return replace(topology, pools=Pools(**changed))


def _with_mesh(pool: PoolConfig, part: str, text: str) -> PoolConfig:
    degrees = re.fullmatch(r"(\d{1,6})x(\d{1,6})", part)
    if degrees is None:
        raise ConfigError(OPTION, text, f"{part!r} is no TPxCP such as 2x1")
    return replace(pool, tp=int(degrees[1]), cp=int(degrees[2]))
