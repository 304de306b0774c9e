"""Blocks go to host memory and come back, into other blocks, as they were."""

from __future__ import annotations

import pytest
import torch

from anabranch.cache.host_kv import HostKv
from anabranch.cache.paged_kv import PagedKv

pytestmark = pytest.mark.unit


def pool(dtype: torch.dtype = torch.float32, device: str = "cpu") -> PagedKv:
    kv = PagedKv(
        num_layers=3,
        num_blocks=6,
        block_size=4,
        num_kv_heads=2,
        head_dim=8,
        dtype=dtype,
        device=torch.device(device),
    )
    kv.data.copy_(torch.arange(kv.data.numel()).reshape(kv.data.shape) % 251)
    return kv


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_through_other_blocks(dtype: torch.dtype, device: str) -> None:
    kv = pool(dtype, device)
    before = kv.data.clone()
    host = HostKv(kv, 4)
    assert host.block_bytes * kv.num_blocks == kv.num_bytes
    host.store(((5, 0), (2, 3)))
    kv.data[:, :, [5, 2]] = 0  # somebody else writes there
    # The host blocks' order and the pool's new blocks are unlike the old ones.
    host.load(((0, 1), (3, 0)))
    assert torch.equal(kv.data[:, :, 1], before[:, :, 5])
    assert torch.equal(kv.data[:, :, 0], before[:, :, 2])
    assert torch.equal(kv.data[:, :, 3:5], before[:, :, 3:5])
    if device == "cuda":
        assert host.data.is_pinned()


def test_measuring_leaves_the_pool_as_it_is() -> None:
    kv = pool()
    before = kv.data.clone()
    rate = HostKv(kv, 4).measure()
    assert 1e6 < rate < 1e13
    assert torch.equal(kv.data, before)
