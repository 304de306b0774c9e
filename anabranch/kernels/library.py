"""Attention over dense K and V on a GPU by the kernels that PyTorch brings, with the LSE.

Nothing is compiled, whatever the shapes. Half precision takes FlashAttention, float32 the memory-efficient
kernel; what neither takes, the plain path.

Shape suffixes: T queries, C keys, H query heads, K KV heads, G query heads per KV head, D head dim.
"""

from __future__ import annotations

import torch

from anabranch.kernels.block_attention import plain_block
from anabranch.kernels.merge import merge
from anabranch.kernels.plain import attend

# Elements of a head that the kernels read at once, and the most that they take.
HEAD_DIM_STEP = 8
MAX_HEAD_DIM = 256


def block_library(
    q_THD: torch.Tensor, k_CKD: torch.Tensor, v_CKD: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over every key.

    Returns:
        `(out [T, H, D] in q's dtype, lse [T, H] float32, natural log)`.
    """
    if not _takes(q_THD):
        return plain_block(q_THD, k_CKD, v_CKD, scale)
    return _call(q_THD, k_CKD, v_CKD, scale, causal=False)


def attend_library(
    q_THD: torch.Tensor, k_CKD: torch.Tensor, v_CKD: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of one sequence's last T tokens over its C tokens.

    Returns:
        `(out [T, H, D] in q's dtype, lse [T, H] float32, natural log)`.
    """
    start = k_CKD.shape[0] - q_THD.shape[0]
    if not _takes(q_THD):
        return attend(q_THD, k_CKD, v_CKD, start, scale, None)
    own = _call(q_THD, k_CKD[start:], v_CKD[start:], scale, causal=True)
    return own if start == 0 else merge(*own, *_call(q_THD, k_CKD[:start], v_CKD[:start], scale, causal=False))


def _takes(q_THD: torch.Tensor) -> bool:
    head_dim = q_THD.shape[2]
    return head_dim % HEAD_DIM_STEP == 0 and head_dim <= MAX_HEAD_DIM


def _call(
    q_THD: torch.Tensor, k_CKD: torch.Tensor, v_CKD: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """KV heads stand where the kernels have their batch, and K and V are shared by a stride of zero."""
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = k_CKD.shape[1]
    group = num_heads // num_kv_heads
    q_KGTD = q_THD.view(num_tokens, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    k_KGCD, v_KGCD = (x_CKD.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for x_CKD in (k_CKD, v_CKD))
    if q_THD.dtype == torch.float32:
        out_KGTD, lse_KGT, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q_KGTD, k_KGCD, v_KGCD, None, True, 0.0, causal, scale=scale
        )
    else:
        out_KGTD, lse_KGT, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q_KGTD, k_KGCD, v_KGCD, 0.0, causal, False, scale=scale
        )
    # The memory-efficient kernel pads the LSE's rows.
    lse_TH = lse_KGT[..., :num_tokens].permute(2, 0, 1).reshape(num_tokens, num_heads)
    return out_KGTD.permute(2, 0, 1, 3).reshape(q_THD.shape), lse_TH.float()
