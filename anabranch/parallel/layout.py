"""Where a KV cache lives: a value that both ends of a stream can compare and plan with."""

from __future__ import annotations

import msgspec

from anabranch.bounds import Extent, Name
from anabranch.errors import ConfigError
from anabranch.parallel.split import kv_heads_of

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class KvLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one worker spreads KV over its `tp x cp` ranks.

    Rank order is `rank = cp_rank * tp + tp_rank`. A TP rank holds a contiguous range of KV heads, nearly
    even, the first ranks one more; where `tp` exceeds `num_kv_heads`, several TP ranks hold the same head
    (replicas). Tokens lie block-cyclic: block `b`
    is CP rank `b % cp`'s.

    Attributes:
        dtype: element type of K and V: float32, bfloat16 or float16.
        num_layers: decoder layers.
        num_kv_heads: KV heads of the whole model.
        head_dim: elements per head.
        block_size: tokens per block.
        tp: tensor-parallel degree.
        cp: context-parallel degree.
    """

    dtype: Name
    num_layers: Extent
    num_kv_heads: Extent
    head_dim: Extent
    block_size: Extent
    tp: Extent = 1
    cp: Extent = 1

    def __post_init__(self) -> None:
        for key in ("num_layers", "num_kv_heads", "head_dim", "block_size", "tp", "cp"):
            if getattr(self, key) < 1:
                raise ConfigError(f"kv_layout.{key}", getattr(self, key), "must be at least 1")
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError("kv_layout.dtype", self.dtype, f"must be one of {', '.join(DTYPE_BYTES)}")

    @property
    def num_ranks(self) -> int:
        return self.tp * self.cp

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token over all layers and heads, replicas not counted."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.element_bytes

    def heads_of(self, tp_rank: int) -> range:
        """KV heads that a TP rank holds."""
        return kv_heads_of(self.num_kv_heads, self.tp, tp_rank)
