"""Meshes given on the command line."""

from __future__ import annotations

import pytest

from anabranch.config.topology import PoolConfig, Pools, Topology
from anabranch.errors import ConfigError
from launch.mesh_option import with_meshes

pytestmark = pytest.mark.unit
SPLIT = Topology(pools=Pools(prefill=PoolConfig(tp=4, kv_cache_bytes=1 << 20), decode=PoolConfig(cp=2)))
COLOCATED = Topology(pools=Pools(colocated=PoolConfig()))


def test_each_pool_gets_its_mesh_and_keeps_the_rest() -> None:
    pools = with_meshes(SPLIT, "2x1:1x3").pools
    assert pools == Pools(prefill=PoolConfig(tp=2, kv_cache_bytes=1 << 20), decode=PoolConfig(cp=3))
    assert with_meshes(COLOCATED, "2x3").pools.colocated == PoolConfig(tp=2, cp=3)


@pytest.mark.parametrize(
    ("topology", "text", "says"),
    [
        (SPLIT, "2x1", r"for each pool \(prefill, decode\)"),
        (COLOCATED, "2x1:1x1", r"for each pool \(colocated\)"),
        (SPLIT, "2x1:three", "'three' is no TPxCP"),
        (SPLIT, "2x1:0x1", "at least 1"),
    ],
)
def test_others_are_refused(topology: Topology, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        with_meshes(topology, text)
