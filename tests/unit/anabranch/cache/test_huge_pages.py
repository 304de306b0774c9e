"""Large pools ask for huge pages, and are what they were."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from anabranch.cache.huge_pages import MIN_BYTES, ask_for_huge_pages
from anabranch.cache.paged_kv import PagedKv

pytestmark = pytest.mark.unit
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_at(address: int) -> list[str]:
    """What the kernel says of the mapping that an address is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(sys.platform != "linux" or not SETTING.exists(), reason="a system without huge pages")
def test_a_large_pool_is_marked_and_zero() -> None:
    kv = PagedKv(
        num_layers=2,
        num_blocks=300,
        block_size=16,
        num_kv_heads=8,
        head_dim=64,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    assert kv.num_bytes > MIN_BYTES
    assert "hg" in flags_at(kv.data.data_ptr() + kv.num_bytes // 2)
    assert not kv.data.any()


def test_small_tensors_and_devices_are_left_alone() -> None:
    assert not ask_for_huge_pages(torch.empty(MIN_BYTES - 4, dtype=torch.uint8))
    assert not ask_for_huge_pages(torch.empty(MIN_BYTES, dtype=torch.uint8, device="meta"))
