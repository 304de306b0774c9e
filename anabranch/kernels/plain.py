"""The reference kernels: PyTorch operations, any device, any floating dtype."""

from __future__ import annotations

import torch
from torch.nn import functional

from anabranch.cache.paged_kv import LayerKv
from anabranch.parallel.group import Group
from anabranch.step.batch import ForwardBatch

# Rows of queries whose scores exist at once: bounds the score matrix to `H x 512 x context` floats.
MAX_SCORE_ROWS = 512


class PlainKernels:
    """`Kernels` in PyTorch operations. What every faster path is tested equal to."""

    name = "plain"

    def rms_norm(self, x_TC: torch.Tensor, weight_C: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Kernels.rms_norm`; rounds to x's dtype before the weight, as transformers does."""
        x_f32 = x_TC.float()
        scaled = x_f32 * torch.rsqrt(x_f32.pow(2).mean(-1, keepdim=True) + eps)
        return weight_C * scaled.to(x_TC.dtype)

    def linear(self, x_TC: torch.Tensor, weight_FC: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
        """See `Kernels.linear`."""
        return functional.linear(x_TC, weight_FC, bias_F)

    def add_rms_norm(
        self, x_TC: torch.Tensor, residual_TC: torch.Tensor, weight_C: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.add_rms_norm`."""
        total_TC = x_TC + residual_TC
        return total_TC, self.rms_norm(total_TC, weight_C, eps)

    def linear_silu_mul(
        self, x_TC: torch.Tensor, gate_up_FC: torch.Tensor, bias_F: torch.Tensor | None
    ) -> torch.Tensor:
        """See `Kernels.linear_silu_mul`."""
        return self.silu_mul(self.linear(x_TC, gate_up_FC, bias_F))

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        """See `Kernels.silu_mul`."""
        gate, up = gate_up_TF.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def rotary(self, x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
        """See `Kernels.rotary`; computed in float32, returns a new tensor of x's dtype."""
        rotary_dim = cos_TR.shape[-1]
        x_f32 = x_THD[..., :rotary_dim].float()
        first, second = x_f32.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        out = (x_f32 * cos_TR.unsqueeze(1) + turned * sin_TR.unsqueeze(1)).to(x_THD.dtype)
        return out if rotary_dim == x_THD.shape[-1] else torch.cat((out, x_THD[..., rotary_dim:]), dim=-1)

    def store_kv(self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, kv: LayerKv, slots_T: torch.Tensor) -> None:
        """See `Kernels.store_kv`."""
        k_slots, v_slots = kv.slots()
        k_slots.index_copy_(0, slots_T, k_TKD)
        v_slots.index_copy_(0, slots_T, v_TKD)

    def export_kv(
        self,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        rows: slice | torch.Tensor,
        heads: slice,
        room_L2RKD: torch.Tensor,
        index: int,
    ) -> None:
        """See `Kernels.export_kv`."""
        for room_RKD, source_TKD in zip(room_L2RKD[index].unbind(0), (k_TKD, v_TKD), strict=True):
            if isinstance(rows, slice):
                room_RKD.copy_(source_TKD[rows, heads])
            else:
                room_RKD.copy_(source_TKD[:, heads].index_select(0, rows.to(source_TKD.device)))

    def import_kv(self, kv_L2TKD: torch.Tensor, pool_L2NBKD: torch.Tensor, slots_T: torch.Tensor) -> None:
        """See `Kernels.import_kv`."""
        num_layers, _, _, _, heads, head_dim = pool_L2NBKD.shape
        pool_L2NBKD.view(num_layers, 2, -1, heads, head_dim).index_copy_(2, slots_T, kv_L2TKD)

    def paged_attention(
        self, q_THD: torch.Tensor, kv: LayerKv, batch: ForwardBatch, scale: float, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.paged_attention`; gathers each sequence's K and V, accumulates in float32."""
        out_THD = torch.empty_like(q_THD)
        lse_TH = torch.empty(q_THD.shape[:2], dtype=torch.float32, device=q_THD.device)
        for b, context_len in enumerate(batch.context_lens):
            start, stop = batch.query_starts[b : b + 2]
            k_CKD, v_CKD = gather_context(kv, batch.block_tables_BN[b], context_len)
            for first in range(start, stop, MAX_SCORE_ROWS):
                rows = slice(first, min(first + MAX_SCORE_ROWS, stop))
                position = context_len - (stop - start) + first - start
                out_THD[rows], lse_TH[rows] = attend(q_THD[rows], k_CKD, v_CKD, position, scale, window)
        return out_THD, lse_TH

    def experts(
        self,
        x_TC: torch.Tensor,
        weights_TS: torch.Tensor,
        experts_TS: torch.Tensor,
        gate_up_EFC: torch.Tensor,
        down_ECF: torch.Tensor,
    ) -> torch.Tensor:
        """See `Kernels.experts`; loops over the experts that some token chose, sums in float32."""
        sum_TC = torch.zeros(x_TC.shape, dtype=torch.float32, device=x_TC.device)
        for expert in sorted(set(experts_TS.flatten().tolist())):
            if expert < 0:
                continue
            tokens, choices = torch.where(experts_TS == expert)
            hidden = self.silu_mul(self.linear(x_TC[tokens], gate_up_EFC[expert], None))
            answer = self.linear(hidden, down_ECF[expert], None).float()
            sum_TC.index_add_(0, tokens, answer * weights_TS[tokens, choices].unsqueeze(-1))
        return sum_TC.to(x_TC.dtype)

    def argmax(self, x_SV: torch.Tensor) -> torch.Tensor:
        """See `Kernels.argmax`."""
        return x_SV.argmax(-1)

    def exact_from(self, x_TC: torch.Tensor, weight_FC: torch.Tensor) -> int | None:
        """See `Products.exact_from`: a library's product."""
        return None

    def all_reduce(self, x: torch.Tensor, group: Group) -> torch.Tensor:
        """See `Kernels.all_reduce`."""
        return group.all_reduce(x)


def gather_context(kv: LayerKv, blocks_N: torch.Tensor, context_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence's K and V, `[context_len, K, D]` each, copied out of its blocks."""
    block_size = kv.k.shape[1]
    blocks = blocks_N[: -(-context_len // block_size)].long()
    return kv.k[blocks].flatten(0, 1)[:context_len], kv.v[blocks].flatten(0, 1)[:context_len]


def attend(
    q_THD: torch.Tensor, k_CKD: torch.Tensor, v_CKD: torch.Tensor, position: int, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of queries at positions `position, position + 1, ...` over keys at `0 .. C - 1`.

    Returns:
        `(out [T, H, D] in q's dtype, lse [T, H] float32)`.
    """
    num_tokens, num_heads, head_dim = q_THD.shape
    context_len, num_kv_heads, _ = k_CKD.shape
    group = num_heads // num_kv_heads
    q_KGTD = q_THD.float().view(num_tokens, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    k_K1DC = k_CKD.float().permute(1, 2, 0).unsqueeze(1)
    v_K1CD = v_CKD.float().transpose(0, 1).unsqueeze(1)
    scores_KGTC = (q_KGTD @ k_K1DC) * scale
    query = torch.arange(position, position + num_tokens, device=q_THD.device).unsqueeze(1)
    key = torch.arange(context_len, device=q_THD.device)
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    scores_KGTC.masked_fill_(hidden, -torch.inf)
    lse_KGT = scores_KGTC.logsumexp(-1)
    out_KGTD = (scores_KGTC - lse_KGT.unsqueeze(-1)).exp_() @ v_K1CD
    out_THD = out_KGTD.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)
    return out_THD.to(q_THD.dtype), lse_KGT.permute(2, 0, 1).reshape(num_tokens, num_heads)
