"""What the owner of KV blocks supplies to a receiver."""

from __future__ import annotations

from typing import Protocol

import torch

from anabranch.errors import AnabranchError
from transport.kv_stream.messages import Commit


class KvSink(Protocol):
    """One stream's destination. All methods run on a plane's progress thread and must not block."""

    def place(self, layer: int, head_start: int, tokens_T: torch.Tensor, kv_L2TKD: torch.Tensor) -> None:
        """Copy the rows of the tokens at positions `tokens_T` (int64, CPU) into the pool before returning.

        `kv_L2TKD` is a contiguous CPU view `[L, 2, T, K, D]` in the layout's dtype, valid during the call only:
        K and V of consecutive layers from `layer` on, of heads from `head_start` on (its number in the whole model).
        Raising fails the stream.
        """
        ...

    def touch(self) -> None:
        """A slice has arrived: extend the lease."""
        ...

    def committed(self, commit: Commit) -> None:
        """All KV is in its place. Called at most once, and never together with `failed`."""
        ...

    def failed(self, error: AnabranchError) -> None:
        """The stream will not commit. Called at most once; the owner calls `close` and frees the blocks."""
        ...
