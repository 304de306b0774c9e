"""The first half of a decoder layer: all of it that needs the KV cache, and the gate that routes tokens.

Shape suffixes: T tokens, C hidden, F features, H query heads, K KV heads, D head dim, R rotary dim.
"""

from __future__ import annotations

import torch

from anabranch.kernels.base import Kernels
from anabranch.model.attention import Attention
from anabranch.model.ffn_half import FfnInput
from anabranch.model.linear import ColumnParallel, Part, RowParallel, fused
from anabranch.model.loader import WeightLoader
from anabranch.model.moe import Gate
from anabranch.parallel.group import Group
from anabranch.parallel.split import kv_heads_of, query_heads_of


class AttentionHalf:
    """Norm, QKV, rotary, attention, output projection, residual; then norm and gate for the other half.

    Args:
        shared: see `Gate`.
    """

    def __init__(
        self, loader: WeightLoader, kernels: Kernels, group: Group, layer: int, *, shared: bool = False
    ) -> None:
        config = loader.config
        head_dim = config.head_dim
        prefix = f"model.layers.{layer}"
        heads = query_heads_of(config.num_heads, config.num_kv_heads, group.size, group.rank)
        kv_heads = kv_heads_of(config.num_kv_heads, group.size, group.rank)
        q_rows = range(heads.start * head_dim, heads.stop * head_dim)
        kv_rows = range(kv_heads.start * head_dim, kv_heads.stop * head_dim)
        num_q, num_kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.input_norm_C = loader.whole(f"{prefix}.input_layernorm.weight", config.hidden_size)
        parts = [
            Part(f"{prefix}.self_attn.q_proj", num_q, q_rows),
            Part(f"{prefix}.self_attn.k_proj", num_kv, kv_rows),
            Part(f"{prefix}.self_attn.v_proj", num_kv, kv_rows),
        ]
        if config.fused_projections:
            parts = fused(f"{prefix}.self_attn.qkv_proj", parts)
        self.qkv = ColumnParallel(loader, kernels, parts, config.hidden_size, bias=config.qkv_bias)
        self.q_norm_D: torch.Tensor | None = None
        self.k_norm_D: torch.Tensor | None = None
        if config.qk_norm:
            self.q_norm_D = loader.whole(f"{prefix}.self_attn.q_norm.weight", head_dim)
            self.k_norm_D = loader.whole(f"{prefix}.self_attn.k_norm.weight", head_dim)
        self.output = RowParallel(
            loader,
            kernels,
            group,
            f"{prefix}.self_attn.o_proj",
            config.hidden_size,
            num_q,
            q_rows,
            bias=config.o_bias,
        )
        self.post_norm_C = loader.whole(f"{prefix}.post_attention_layernorm.weight", config.hidden_size)
        self.gate = Gate(loader, kernels, layer, shared=shared) if config.is_sparse(layer) else None
        self.layer = layer
        self.num_heads = len(heads)
        self.num_kv_heads = len(kv_heads)
        self.window = config.windows[layer]
        self._kernels = kernels
        self._eps = config.rms_eps
        self._scale = head_dim**-0.5
        self._head_dim = head_dim
        self._widths = [len(q_rows), len(kv_rows), len(kv_rows)]

    def step(
        self,
        hidden_TC: torch.Tensor,
        answer_TC: torch.Tensor | None,
        cos_TR: torch.Tensor,
        sin_TR: torch.Tensor,
        attention: Attention,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All but the gate, by calls of kernels alone; each residual and the norm after it are one pass.

        Args:
            hidden_TC: without the answer of the layer before.
            answer_TC: what the FFN half of the layer before answered, not yet added to `hidden_TC`; None: nothing.

        Returns:
            The hidden states that this layer's FFN answer is to be added to, and the rows for `choose`.
        """
        kernels = self._kernels
        if answer_TC is None:
            normed_TC = kernels.rms_norm(hidden_TC, self.input_norm_C, self._eps)
        else:
            hidden_TC, normed_TC = kernels.add_rms_norm(answer_TC, hidden_TC, self.input_norm_C, self._eps)
        attended_TC = self._attend(normed_TC, cos_TR, sin_TR, attention)
        return kernels.add_rms_norm(attended_TC, hidden_TC, self.post_norm_C, self._eps)

    def _attend(
        self, normed_TC: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        kernels = self._kernels
        q_TF, k_TF, v_TF = self.qkv.forward(normed_TC).split_with_sizes(self._widths, dim=-1)
        q_THD = q_TF.view(-1, self.num_heads, self._head_dim)
        k_TKD = k_TF.view(-1, self.num_kv_heads, self._head_dim)
        v_TKD = v_TF.view(-1, self.num_kv_heads, self._head_dim)
        if self.q_norm_D is not None and self.k_norm_D is not None:
            q_THD = kernels.rms_norm(q_THD, self.q_norm_D, self._eps)
            k_TKD = kernels.rms_norm(k_TKD, self.k_norm_D, self._eps)
        q_THD = kernels.rotary(q_THD, cos_TR, sin_TR)
        k_TKD = kernels.rotary(k_TKD, cos_TR, sin_TR)
        out_THD, _ = attention.attend(self.layer, q_THD, k_TKD, v_TKD, self._scale, self.window)
        return self.output.forward(out_THD.flatten(1))

    def choose(self, normed_TC: torch.Tensor) -> FfnInput:
        """The gate, if there is one: what the FFN half is given."""
        if self.gate is None:
            return FfnInput(normed_TC, None, None)
        return self.gate.forward(normed_TC)
