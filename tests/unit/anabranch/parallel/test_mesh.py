"""The mesh of ranks: who is where, who is whose neighbour, and what does not fit."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.parallel.mesh import MAX_RANKS, Mesh, check_model, rank_devices

pytestmark = pytest.mark.unit


@given(tp=st.integers(1, 8), cp=st.integers(1, 8))
def test_every_place_of_the_mesh_has_one_rank(tp: int, cp: int) -> None:
    mesh = Mesh(tp=tp, cp=cp)
    places = [(mesh.cp_rank(rank), mesh.tp_rank(rank)) for rank in range(tp * cp)]
    assert places == [(row, column) for row in range(cp) for column in range(tp)]


def test_tensor_parallel_ranks_are_neighbours() -> None:
    mesh = Mesh(tp=2, cp=3)
    assert (mesh.tp_rank(5), mesh.cp_rank(5)) == (1, 2)


@pytest.mark.parametrize(("tp", "cp", "words"), [(0, 1, "tp: 0"), (1, -2, "cp: -2"), (16, 8, "128 ranks")])
def test_impossible_degrees_are_refused(tp: int, cp: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Mesh(tp=tp, cp=cp)
    assert Mesh(tp=1, cp=MAX_RANKS).world_size == MAX_RANKS


def test_a_model_must_give_every_rank_work() -> None:
    check_model(Mesh(tp=4, cp=9), num_heads=9, intermediate_size=1536)  # uneven shares are fine
    with pytest.raises(ConfigError, match="at most the model's 9 query heads"):
        check_model(Mesh(tp=10), num_heads=9, intermediate_size=1536)
    with pytest.raises(ConfigError, match="at most the model's 3 FFN features"):
        check_model(Mesh(tp=4), num_heads=9, intermediate_size=3)


def test_devices_are_dealt_out_or_shared() -> None:
    mesh = Mesh(tp=2, cp=2)
    assert rank_devices(mesh, "cpu", 0) == ("cpu",) * 4
    assert rank_devices(mesh, "cuda", 4) == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    assert rank_devices(mesh, "cuda:2", 6) == ("cuda:2", "cuda:3", "cuda:4", "cuda:5")
    with pytest.raises(ConfigError, match=r"2 x 2.*needs 4 devices from cuda:1 on, but 4 are visible"):
        rank_devices(mesh, "cuda:1", 4)


def test_it_needs_no_torch() -> None:
    check = "import sys, anabranch.parallel.mesh; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0
