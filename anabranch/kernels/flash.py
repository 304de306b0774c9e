"""Attention of a chunk of new tokens through PyTorch's flash kernel for CPUs."""

from __future__ import annotations

import torch

from anabranch.kernels.merge import merge


def attend_flash(
    q_THD: torch.Tensor, k_CKD: torch.Tensor, v_CKD: torch.Tensor, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of one sequence's last T tokens over its C tokens, without copying K and V per group.

    KV heads stand where the kernel has its batch, and the query heads of a group where it has its heads, with
    K and V repeated by a stride of zero.

    Returns:
        `(out [T, H, D], lse [T, H] float32)`.
    """
    num_tokens, num_heads, head_dim = q_THD.shape
    context_len, num_kv_heads, _ = k_CKD.shape
    group = num_heads // num_kv_heads
    q_KGTD = q_THD.reshape(num_tokens, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)

    def call(keys: slice, causal: bool, mask_TC: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        k_KGCD, v_KGCD = (
            x_CKD[keys].transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for x_CKD in (k_CKD, v_CKD)
        )
        out_KGTD, lse_KGT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_KGTD, k_KGCD, v_KGCD, 0.0, causal, attn_mask=mask_TC, scale=scale
        )
        out_THD = out_KGTD.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)
        return out_THD, lse_KGT.permute(2, 0, 1).reshape(num_tokens, num_heads)

    start = context_len - num_tokens
    if window is not None and context_len > window:
        first = max(0, start - window + 1)
        query = torch.arange(start, context_len).unsqueeze(1)
        key = torch.arange(first, context_len)
        hidden = (key > query) | (key <= query - window)
        mask = torch.zeros(hidden.shape, dtype=q_THD.dtype).masked_fill_(hidden, -torch.inf)
        return call(slice(first, context_len), False, mask)
    own = call(slice(start, context_len), True, None)
    return own if start == 0 else merge(*own, *call(slice(0, start), False, None))
