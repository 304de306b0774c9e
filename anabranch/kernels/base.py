"""The operations that a decoder layer is made of, behind one interface.

`PlainKernels` is the reference in PyTorch operations, on any device. `NativeKernels` is the CPU path,
compiled at first use where a C++ compiler is present; `FlexKernels` the GPU path, where attention is compiled
by PyTorch. A model is given one object and calls nothing else.

Shape suffixes: T tokens, C hidden, F features, H query heads, K KV heads, D head dim, E experts, S chosen
experts of a token.
"""

from __future__ import annotations

from typing import Protocol

import torch

from anabranch.cache.paged_kv import LayerKv
from anabranch.parallel.group import Group
from anabranch.step.batch import ForwardBatch


class Products(Protocol):
    """What an FFN half is computed with."""

    def linear(self, x_TC: torch.Tensor, weight_FC: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
        """`x @ weight.T + bias`; the weight is row-major and stays the only copy."""
        ...

    def linear_silu_mul(
        self, x_TC: torch.Tensor, gate_up_FC: torch.Tensor, bias_F: torch.Tensor | None
    ) -> torch.Tensor:
        """`silu_mul(linear(x))` in one pass: `[T, C] -> [T, F / 2]`."""
        ...

    def exact_from(self, x_TC: torch.Tensor, weight_FC: torch.Tensor) -> int | None:
        """Rows from which on the bits of a row of these products depend neither on the others nor on their number.

        None: they may depend on the number, however many there are.
        """
        ...

    def all_reduce(self, x: torch.Tensor, group: Group) -> torch.Tensor:
        """`group.all_reduce(x)`, known to the kernels, so that it can be a part of what they record."""
        ...


class Kernels(Products, Protocol):
    name: str

    def rms_norm(self, x_TC: torch.Tensor, weight_C: torch.Tensor, eps: float) -> torch.Tensor:
        """RMS norm over the last axis, accumulated in float32; returns x's dtype. Also for `[T, H, D]`."""
        ...

    def add_rms_norm(
        self, x_TC: torch.Tensor, residual_TC: torch.Tensor, weight_C: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(sum, rms_norm(sum))` of `x + residual`: the end of one half and the beginning of the next, in one pass."""
        ...

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        """`silu(first half) * second half` over the last axis: `[T, 2F] -> [T, F]`."""
        ...

    def rotary(self, x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of each head's first R features, half-split convention; the others stay as they are.

        Args:
            cos_TR, sin_TR: float32, both halves filled; R is even and at most D.
        """
        ...

    def store_kv(self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, kv: LayerKv, slots_T: torch.Tensor) -> None:
        """Write new tokens' K and V to their slots."""
        ...

    def export_kv(
        self,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        rows: slice | torch.Tensor,
        heads: slice,
        room_L2RKD: torch.Tensor,
        index: int,
    ) -> None:
        """Copy some rows and heads of a layer's K and V to `room_L2RKD[index]`, which is contiguous CPU memory.

        Args:
            rows: a span, or int64 indices on the CPU, ascending.
        """
        ...

    def import_kv(self, kv_L2TKD: torch.Tensor, pool_L2NBKD: torch.Tensor, slots_T: torch.Tensor) -> None:
        """Write K and V that came from elsewhere to their slots, several layers at once.

        Nobody reads them soon, so they are not kept in the caches.

        Args:
            kv_L2TKD: contiguous.
            pool_L2NBKD: the same layers of `PagedKv.data`, and of its heads those that came.
            slots_T: int64; the same in every layer.
        """
        ...

    def paged_attention(
        self, q_THD: torch.Tensor, kv: LayerKv, batch: ForwardBatch, scale: float, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal attention of each sequence's new tokens over its whole paged context (new KV is stored).

        `window`: a token sees itself and the `window - 1` tokens before it; None: all before it.
        Returns `(out [T, H, D], lse [T, H] float32, natural log)`.
        """
        ...

    def experts(
        self,
        x_TC: torch.Tensor,
        weights_TS: torch.Tensor,
        experts_TS: torch.Tensor,
        gate_up_EFC: torch.Tensor,
        down_ECF: torch.Tensor,
    ) -> torch.Tensor:
        """Mixture of experts: `sum_s weights[t, s] * down(silu_mul(gate_up(x)))` of the chosen experts.

        `weights_TS` float32, `experts_TS` int64 (local ids; -1: not held here, adds nothing).
        """
        ...

    def argmax(self, x_SV: torch.Tensor) -> torch.Tensor:
        """Place of each row's largest element, int64 `[S]`: the first of equals; NaN before all."""
        ...
