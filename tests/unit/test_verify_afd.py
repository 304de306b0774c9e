"""The selections of `scripts/verify-afd`: the whole product, and a part in which every two values meet."""

from __future__ import annotations

import itertools

import pytest

from anabranch.config.topology import AttnPoolConfig, FfnPoolConfig, PoolConfig, Pools, Topology
from launch.mesh_option import with_meshes
from tests.support.verify_afd import COLUMNS, PAIRS, mesh_of, pairwise, product

pytestmark = pytest.mark.unit


def test_every_two_values_of_two_columns_meet_in_the_pairwise_part() -> None:
    rows = pairwise()
    assert set(rows) <= set(product())
    assert len(rows) <= 48
    for (a, first), (b, second) in itertools.combinations(enumerate(COLUMNS), 2):
        met = {(row[a], row[b]) for row in rows}
        assert met == set(itertools.product(first, second))


def test_every_row_is_a_topology() -> None:
    assert len(product()) == 11 * 4 * 4 * 3
    base = Topology(pools=Pools(prefill=PoolConfig(), attn=AttnPoolConfig(), ffn=FfnPoolConfig()))
    found = set()
    for row in product():
        pools = with_meshes(base, mesh_of(row)).pools
        assert pools.attn is not None
        assert pools.ffn is not None
        assert pools.prefill is not None
        found.add((pools.attn.workers, pools.ffn.workers))
        assert f"{pools.prefill.tp}x{pools.prefill.cp}" == row[3]
        assert (f"{pools.attn.tp}x{pools.attn.cp}", pools.attn.lanes) == (row[2], row[1])
    assert found == set(PAIRS)
