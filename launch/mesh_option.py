"""Meshes on the command line: `2x1:1x3` puts a prefill pool of TP 2 before a decode pool of CP 3.

`1x1:attn2*2x1/4+ffn3` puts it before 2 attention workers of TP 2 with 4 lanes each, and 3 FFN workers.
"""

from __future__ import annotations

import re
from dataclasses import replace

from anabranch.config.topology import AnyPoolConfig, PoolConfig, Pools, Topology
from anabranch.errors import ConfigError
from anabranch.protocol.workers import Role

OPTION = "--mesh"
_SPLIT = re.compile(r"attn(?:(\d{1,3})\*)?(\d{1,6}x\d{1,6})(?:/(\d))?\+ffn(\d{1,3})(?:x(\d{1,6}))?")


def with_meshes(topology: Topology, text: str) -> Topology:
    """A topology whose pools have other meshes.

    Args:
        text: TPxCP of the prefill and of the decode pool, as `2x1:1x3`; of the colocated pool, as `2x2`; of attn and
            ffn pools `attnTPxCP+ffnN` for N FFN workers, with `attnM*` for M attention workers, `/L` before the plus
            for L lanes, and `xTP` at the end for FFN workers of several ranks. What is not said stays the topology's.

    Raises:
        ConfigError: no mesh, or not one for each pool.
    """
    roles = [role for role in topology.pools.by_role if role != "ffn"]
    parts = text.split(":")
    if len(parts) != len(roles):
        pools = ", ".join("attnTPxCP+ffnN for attn and ffn" if role == "attn" else role for role in roles)
        raise ConfigError(OPTION, text, f"give TPxCP for each pool ({pools}), with colons between")
    changed: dict[Role, AnyPoolConfig] = {}
    for role, part in zip(roles, parts, strict=True):
        if role == "attn":
            changed |= _with_split(topology.pools, part, text)
        else:
            changed[role] = _with_mesh(topology.pools.by_role[role], part, text)
    return replace(topology, pools=replace(topology.pools, **changed))  # type: ignore[arg-type]


def _with_split(pools: Pools, part: str, text: str) -> dict[Role, AnyPoolConfig]:
    found = _SPLIT.fullmatch(part)
    if found is None:
        raise ConfigError(OPTION, text, f"{part!r} is no attnTPxCP+ffnN such as attn2x1+ffn3 or attn2*1x1/4+ffn3x2")
    assert pools.attn is not None and pools.ffn is not None
    workers, mesh, lanes, num_ffn, ffn_tp = found.groups()
    attn = replace(pools.attn, workers=int(workers or pools.attn.workers), lanes=int(lanes or pools.attn.lanes))
    ffn = replace(pools.ffn, workers=int(num_ffn), tp=int(ffn_tp or pools.ffn.tp))
    return {"attn": _with_mesh(attn, mesh, text), "ffn": ffn}


def _with_mesh(pool: AnyPoolConfig, part: str, text: str) -> AnyPoolConfig:
    degrees = re.fullmatch(r"(\d{1,6})x(\d{1,6})", part)
    if degrees is None:
        raise ConfigError(OPTION, text, f"{part!r} is no TPxCP such as 2x1")
    assert isinstance(pool, PoolConfig)
    return replace(pool, tp=int(degrees[1]), cp=int(degrees[2]))
