"""Attention over the paged KV cache of one rank: what the model's layers are given in every worker."""

from __future__ import annotations

from typing import Protocol

import torch

from anabranch.cache.paged_kv import PagedKv
from anabranch.kernels.base import Kernels
from anabranch.step.batch import ForwardBatch
from anabranch.step.plan import StepPlan


class LayerSink(Protocol):
    """Hears of every layer whose KV is in the pool; prefill streams it from there.

    A step may take several passes over the model, each for some of the plan's sequences.
    """

    def begin_pass(self, plan: StepPlan) -> None:
        """What follows is about these sequences."""
        ...

    def layer_stored(self, layer: int) -> None: ...


class PagedAttention:
    """Stores new tokens' K and V in their slots, tells the sink, and attends over each sequence's context.

    Args:
        batch: the step's ragged batch; one object serves one forward pass.
        sink: called after each layer's KV is stored and before attention over it is computed.
    """

    def __init__(self, kernels: Kernels, kv: PagedKv, batch: ForwardBatch, sink: LayerSink | None = None) -> None:
        self.kernels = kernels
        self.kv = kv
        self.batch = batch
        self.sink = sink

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `(out [T, H, D], lse [T, H])`."""
        kv = self.kv.layer(layer)
        self.kernels.store_kv(k_TKD, v_TKD, kv, self.batch.slots_T)
        if self.sink is not None:
            self.sink.layer_stored(layer)
        return self.kernels.paged_attention(q_THD, kv, self.batch, scale, window)
