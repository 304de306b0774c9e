"""Puts arriving KV slices into the blocks that a reservation holds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from anabranch.cache.paged_kv import LayerKv, PagedKv
from anabranch.errors import AnabranchError
from anabranch.kernels.base import Kernels
from transport.kv_stream import Commit


class KvImport:
    """One stream's `KvSink`; its methods run on a tensor plane's thread.

    Args:
        block_ids: the reservation's blocks, in token order.
        on_touch, on_commit, on_failure: hand the news to the engine's thread.
    """

    def __init__(
        self,
        kv: PagedKv,
        kernels: Kernels,
        block_ids: tuple[int, ...],
        *,
        on_touch: Callable[[], None],
        on_commit: Callable[[Commit], None],
        on_failure: Callable[[AnabranchError], None],
    ) -> None:
        self.kv = kv
        self.kernels = kernels
        size = kv.block_size
        self.slots_T = torch.tensor(
            [block * size + offset for block in block_ids for offset in range(size)], dtype=torch.int64
        )
        self._on_touch = on_touch
        self._on_commit = on_commit
        self._on_failure = on_failure

    def place(self, layer: int, head_start: int, token_start: int, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> None:
        """Copy rows into the pool. See `KvSink.place`."""
        pool = self.kv.layer(layer)
        heads = slice(head_start, head_start + k_TKD.shape[1])
        slots_T = self.slots_T[token_start : token_start + k_TKD.shape[0]]
        device = self.kv.data.device
        self.kernels.store_kv(
            k_TKD.to(device),
            v_TKD.to(device),
            LayerKv(pool.k[:, :, heads], pool.v[:, :, heads]),
            slots_T.to(device),
        )

    def touch(self) -> None:
        self._on_touch()

    def committed(self, commit: Commit) -> None:
        self._on_commit(commit)

    def failed(self, error: AnabranchError) -> None:
        self._on_failure(error)
