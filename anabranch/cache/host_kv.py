"""Blocks of a rank's KV pool in host memory, where they wait while their sequence is preempted."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from anabranch.cache.paged_kv import PagedKv

# Enough for a rate that holds for larger copies, little enough not to be noticed at the start.
_MEASURED_BYTES = 16 << 20
_NUM_MEASURED = 3


class HostKv:
    """Room for `num_blocks` blocks of a pool, `[num_blocks, num_layers, 2, block_size, Hkv, D]`.

    A block is one piece here, whatever the pool's layout, so that each is one transfer. Pinned where the pool is on
    an accelerator; on the CPU the kernel gives memory only as it is first written to.

    Copies take their turn among the steps of the calling thread's stream: what was called earlier has written its
    blocks before a copy reads them, and a copy is over before what is called later writes to the same blocks.

    Args:
        kv: the rank's pool.
    """

    def __init__(self, kv: PagedKv, num_blocks: int) -> None:
        assert num_blocks > 0
        self.kv = kv
        self.num_blocks = num_blocks
        num_layers, sides, _, *inner = kv.data.shape
        self.data = torch.empty(
            (num_blocks, num_layers, sides, *inner), dtype=kv.data.dtype, pin_memory=kv.data.device.type == "cuda"
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of this rank."""
        return self.data[0].numel() * self.data.element_size()

    @torch.inference_mode()
    def store(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks out: `(pool block, host block)`."""
        for block_id, host_id in pairs:
            self.data[host_id].copy_(self.kv.data[:, :, block_id], non_blocking=True)

    @torch.inference_mode()
    def load(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks in: `(host block, pool block)`."""
        for host_id, block_id in pairs:
            self.kv.data[:, :, block_id].copy_(self.data[host_id], non_blocking=True)

    def measure(self) -> float:
        """Bytes per second that blocks are copied with, out and in on the average; before the pool is used."""
        num_blocks = min(self.num_blocks, self.kv.num_blocks, max(1, _MEASURED_BYTES // self.block_bytes))
        pairs = tuple((block, block) for block in range(num_blocks))
        self._round_trip(pairs)  # pages are given, and buffers made, once
        fastest_s = min(self._round_trip(pairs) for _ in range(_NUM_MEASURED))
        return 2 * num_blocks * self.block_bytes / max(fastest_s, 1e-9)

    def _round_trip(self, pairs: Sequence[tuple[int, int]]) -> float:
        begun_s = time.perf_counter()
        self.store(pairs)
        self.load(pairs)
        if self.kv.data.device.type == "cuda":
            torch.cuda.synchronize(self.kv.data.device)
        return time.perf_counter() - begun_s
