"""Meshes given on the command line."""

from __future__ import annotations

import pytest

from anabranch.config.topology import AttnPoolConfig, FfnPoolConfig, PoolConfig, Pools, Topology
from anabranch.errors import ConfigError
from launch.mesh_option import with_meshes

pytestmark = pytest.mark.unit
SPLIT = Topology(pools=Pools(prefill=PoolConfig(tp=4, kv_cache_bytes=1 << 20), decode=PoolConfig(cp=2)))
APART = Topology(
    pools=Pools(prefill=PoolConfig(), attn=AttnPoolConfig(lanes=3), ffn=FfnPoolConfig(workers=2, replicas=2, tp=2))
)
COLOCATED = Topology(pools=Pools(colocated=PoolConfig()))


def test_each_pool_gets_its_mesh_and_keeps_the_rest() -> None:
    pools = with_meshes(SPLIT, "2x1:1x3").pools
    assert pools == Pools(prefill=PoolConfig(tp=2, kv_cache_bytes=1 << 20), decode=PoolConfig(cp=3))
    assert with_meshes(COLOCATED, "2x3").pools.colocated == PoolConfig(tp=2, cp=3)


def test_attention_and_ffn_pools_are_given_together() -> None:
    assert with_meshes(APART, "2x1:attn2x1+ffn3").pools == Pools(
        prefill=PoolConfig(tp=2),
        attn=AttnPoolConfig(tp=2, lanes=3),
        ffn=FfnPoolConfig(workers=3, replicas=2, tp=2),
    )
    assert with_meshes(APART, "1x1:attn4*1x2/1+ffn2x1").pools == Pools(
        prefill=PoolConfig(),
        attn=AttnPoolConfig(workers=4, cp=2, lanes=1),
        ffn=FfnPoolConfig(workers=2, replicas=2, tp=1),
    )


@pytest.mark.parametrize(
    ("topology", "text", "says"),
    [
        (SPLIT, "2x1", r"for each pool \(prefill, decode\)"),
        (COLOCATED, "2x1:1x1", r"for each pool \(colocated\)"),
        (SPLIT, "2x1:three", "'three' is no TPxCP"),
        (SPLIT, "2x1:0x1", "at least 1"),
        (APART, "1x1", r"for each pool \(prefill, attnTPxCP\+ffnN for attn and ffn\)"),
        (APART, "1x1:2x1", "'2x1' is no attnTPxCP"),
        (APART, "1x1:attn2x1", "'attn2x1' is no attnTPxCP"),
        (APART, "1x1:attn1x1/5+ffn2", "lanes: 5: must be at most 4"),
        (APART, "1x1:attn1x1+ffn1", "replicas: 2: must be at most the pool's 1 workers"),
        (APART, "1x1:attn0*1x1+ffn2", "workers: 0: must be at least 1"),
    ],
)
def test_others_are_refused(topology: Topology, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        with_meshes(topology, text)
