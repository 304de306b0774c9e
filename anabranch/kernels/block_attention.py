"""Attention of some queries over one block of dense K and V, with its LSE: the inner step of a ring.

Kernels that have a way of their own for it say so by `BlockKernels`.

Shape suffixes: T queries, C keys, H query heads, K KV heads, G query heads per KV head, D head dim.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from anabranch.kernels.base import Kernels

# Rows of queries whose scores exist at once in the plain path.
MAX_SCORE_ROWS = 512


@runtime_checkable
class BlockKernels(Protocol):
    """What kernels may have besides `Kernels`."""

    def block_attention(
        self, q_THD: torch.Tensor, k_CKD: torch.Tensor, v_CKD: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of every query over every key; `(out [T, H, D] in q's dtype, lse [T, H] float32)`."""
        ...


def attend_block(
    kernels: Kernels,
    q_THD: torch.Tensor,
    k_CKD: torch.Tensor,
    v_CKD: torch.Tensor,
    scale: float,
    hidden_TC: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over one block; picks the fastest way that there is for the device.

    Args:
        hidden_TC: bool, True where the query must not see the key; a query may see none.

    Returns:
        `(out [T, H, D] in q's dtype, lse [T, H] float32, natural log)`; a query that sees no key has zeros and -inf.
    """
    if hidden_TC is None and isinstance(kernels, BlockKernels):
        return kernels.block_attention(q_THD, k_CKD, v_CKD, scale)
    if hidden_TC is None and q_THD.device.type == "cpu":
        return flash_block(q_THD, k_CKD, v_CKD, scale)
    return plain_block(q_THD, k_CKD, v_CKD, scale, hidden_TC)


def flash_block(
    q_THD: torch.Tensor, k_CKD: torch.Tensor, v_CKD: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_block` without a mask by PyTorch's flash attention for the CPU."""
    num_kv_heads = k_CKD.shape[1]
    group = q_THD.shape[1] // num_kv_heads
    # KV heads stand as the batch, and the group as heads that share K and V by a stride of zero: no copies.
    q_KGTD = q_THD.view(-1, num_kv_heads, group, q_THD.shape[2]).permute(1, 2, 0, 3)
    k_KGCD = k_CKD.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    v_KGCD = v_CKD.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    out_KGTD, lse_KGT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_KGTD, k_KGCD, v_KGCD, 0.0, False, scale=scale
    )
    return out_KGTD.permute(2, 0, 1, 3).flatten(1, 2), lse_KGT.permute(2, 0, 1).flatten(1, 2).float()


def plain_block(
    q_THD: torch.Tensor,
    k_CKD: torch.Tensor,
    v_CKD: torch.Tensor,
    scale: float,
    hidden_TC: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_block` in PyTorch operations, on any device; scores and sums in float32."""
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = k_CKD.shape[1]
    k_K1DC = k_CKD.float().permute(1, 2, 0).unsqueeze(1)
    v_K1CD = v_CKD.float().transpose(0, 1).unsqueeze(1)
    out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    lse_TH = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=q_THD.device)
    for first in range(0, num_tokens, MAX_SCORE_ROWS):
        rows = slice(first, min(first + MAX_SCORE_ROWS, num_tokens))
        q_KGTD = q_THD[rows].float().view(-1, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(1, 2, 0, 3)
        scores_KGTC = (q_KGTD @ k_K1DC) * scale
        if hidden_TC is not None:
            scores_KGTC.masked_fill_(hidden_TC[rows], -torch.inf)
        lse_KGT = scores_KGTC.logsumexp(-1)
        # A query that sees nothing has an LSE of -inf; any finite stand-in makes its weights zero.
        base_KGT = lse_KGT.masked_fill(lse_KGT == -torch.inf, 0.0)
        out_KGTD = (scores_KGTC - base_KGT.unsqueeze(-1)).exp_() @ v_K1CD
        out_THD[rows] = out_KGTD.permute(2, 0, 1, 3).flatten(1, 2).to(q_THD.dtype)
        lse_TH[rows] = lse_KGT.permute(2, 0, 1).flatten(1, 2)
    return out_THD, lse_TH
