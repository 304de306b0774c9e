"""Kernels for GPUs: paged attention by PyTorch's FlexAttention, compiled to Triton; the rest from `PlainKernels`.

Attention reads the pool where it lies: a block mask made from the block tables, once for each step and shared
by its layers, says which blocks each tile of queries reads (see `TilePlan`). Uncompiled, FlexAttention computes
the same on any device, over all of the pool: that is what tests without a GPU compare.

Source: FlexAttention (Dong et al. 2024); FlashDecoding (Dao et al. 2023) for contexts cut into parts.

Shape suffixes: T tokens, H query heads, K KV heads, D head dim, C keys, L rows of tiles, S slots of the pool.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn.attention import flex_attention as flex
from torch.utils._triton import has_triton

from anabranch.cache.paged_kv import LayerKv, PagedKv
from anabranch.kernels.base import Kernels
from anabranch.kernels.batch_plans import BatchPlans
from anabranch.kernels.block_attention import flash_block
from anabranch.kernels.flex_plan import Member, TilePlan, TileShape, round_up
from anabranch.kernels.library import attend_library, block_library
from anabranch.kernels.plain import PlainKernels, gather_context
from anabranch.step.batch import ForwardBatch
from anabranch.step.plan import SequencePlan, StepPlan

if TYPE_CHECKING:  # from PyTorch 2.9 on
    from torch.nn.attention.flex_attention import FlexKernelOptions

log = logging.getLogger(__name__)

# The matrix instructions' least number of rows; also of the keys that a tile reads at once.
MIN_TILE_ROWS = 16
MAX_TILE_ROWS = 64
MAX_TILE_KEYS = 64
# Bytes of keys, or of queries, that a tile holds at once: two stages of K and V fit every GPU's shared memory.
MAX_TILE_BYTES = 16 << 10
MIN_HEAD_DIM = 16
# The compiled kernels count elements of a layer's pool in 32 bits.
MAX_POOL_ELEMENTS = 1 << 31
# Shapes are few (powers of two), but more than the compiler allows for one function by itself.
MAX_COMPILED_SHAPES = 64
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}

Laid = tuple[TilePlan, flex.BlockMask, torch.Tensor | None]


class FlexUnavailable(Exception):
    """FlexAttention cannot be used here; the message says why."""


class Attend(Protocol):
    """`attend_tiles`, or what it was compiled to."""

    def __call__(
        self,
        q_1KLD: torch.Tensor,
        k_1KSD: torch.Tensor,
        v_1KSD: torch.Tensor,
        mask: flex.BlockMask,
        scale: float,
        options: FlexKernelOptions,
        num_parts: int,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def select_gpu_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """FlexAttention where it works on this device, else the plain kernels, with the reason in the log."""
    try:
        return load_flex(device, dtype)
    except FlexUnavailable as error:
        log.warning("no compiled kernels for %s, running PyTorch operations: %s", device, error)
        return PlainKernels()


def load_flex(device: torch.device, dtype: torch.dtype) -> FlexKernels:
    """Compiled kernels for a CUDA device, after they have agreed with the plain ones on it.

    Raises:
        FlexUnavailable: no Triton for the device, or what it compiles fails or computes something else.
    """
    if not has_triton():
        raise FlexUnavailable("there is no Triton for this device, with which PyTorch compiles FlexAttention")
    kernels = FlexKernels()
    try:
        error = _largest_error(kernels, device, dtype)
    except Exception as failure:  # compilers raise whatever they like, and the plain kernels compute all the same
        reason = str(failure).strip().splitlines() or ["no message"]
        raise FlexUnavailable(f"compiling FlexAttention failed: {type(failure).__name__}: {reason[0]}") from failure
    if not error < TOLERANCES[dtype]:
        raise FlexUnavailable(f"compiled FlexAttention is off by {error:.3g} from plain attention in {dtype}")
    return kernels


class FlexKernels(PlainKernels):
    """`Kernels` and `BlockKernels` for one worker's device.

    Args:
        compiled: False computes with FlexAttention uncompiled: slowly, on any device.
    """

    name = "flex"

    def __init__(self, *, compiled: bool = True) -> None:
        self._attend: Attend = attend_tiles
        if compiled:
            config = torch._dynamo.config
            config.recompile_limit = max(config.recompile_limit, MAX_COMPILED_SHAPES)
            self._attend = torch.compile(attend_tiles, fullgraph=True)
        self._plans = BatchPlans[tuple[Laid, ...]]()

    def paged_attention(
        self, q_THD: torch.Tensor, kv: LayerKv, batch: ForwardBatch, scale: float, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.paged_attention`.

        Blocks of a multiple of 16 tokens are read in place; others, and heads of fewer than 16 features, are
        gathered first.
        """
        if not _reads_in_place(q_THD, kv):
            return self._gathered_attention(q_THD, kv, batch, scale, window)
        k_1KSD, v_1KSD = (x_SKD.transpose(0, 1).unsqueeze(0) for x_SKD in kv.slots())
        key = (window, q_THD.shape, kv.k.shape)
        laid = self._plans.get(batch, key, lambda: self._lay_out(q_THD, kv, batch, window))
        results = []
        for plan, mask, rows_T in laid:
            q_1KLD = plan.gather(q_THD if rows_T is None else q_THD[rows_T])
            out_KLD, lse_KL = self._attend(
                q_1KLD, k_1KSD, v_1KSD, mask, scale, _kernel_options(plan.shape, kv), plan.num_parts
            )
            results.append((plan.scatter(out_KLD), plan.scatter(lse_KL)))
        if len(laid) == 1:
            return results[0]
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        lse_TH = torch.empty(q_THD.shape[:2], dtype=torch.float32, device=q_THD.device)
        for (_, _, rows_T), (out, lse) in zip(laid, results, strict=True):
            out_THD[rows_T], lse_TH[rows_T] = out, lse
        return out_THD, lse_TH

    def block_attention(
        self, q_THD: torch.Tensor, k_CKD: torch.Tensor, v_CKD: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `BlockKernels.block_attention`: K and V are dense, so PyTorch's own kernels serve as they are."""
        if q_THD.is_cpu:
            return flash_block(q_THD, k_CKD, v_CKD, scale)
        return block_library(q_THD, k_CKD, v_CKD, scale)

    def _gathered_attention(
        self, q_THD: torch.Tensor, kv: LayerKv, batch: ForwardBatch, scale: float, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if q_THD.is_cpu or window is not None:
            return super().paged_attention(q_THD, kv, batch, scale, window)
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        lse_TH = torch.empty(q_THD.shape[:2], dtype=torch.float32, device=q_THD.device)
        for b, context_len in enumerate(batch.context_lens):
            rows = slice(*batch.query_starts[b : b + 2])
            k_CKD, v_CKD = gather_context(kv, batch.block_tables_BN[b], context_len)
            out_THD[rows], lse_TH[rows] = attend_library(q_THD[rows], k_CKD, v_CKD, scale)
        return out_THD, lse_TH

    def _lay_out(self, q_THD: torch.Tensor, kv: LayerKv, batch: ForwardBatch, window: int | None) -> tuple[Laid, ...]:
        """The plans of a batch: short queries apart from long ones."""
        num_blocks, block_size, num_kv_heads, _ = kv.k.shape
        group = q_THD.shape[1] // num_kv_heads
        members: dict[int, list[Member]] = {}
        for index, (start, stop) in enumerate(pairwise(batch.query_starts)):
            context_len = batch.context_lens[index]
            member = Member(index=index, first_row=start, num_tokens=stop - start, context_len=context_len)
            members.setdefault(_tile_rows(member.num_tokens * group, kv), []).append(member)
        laid = []
        for rows, some in sorted(members.items()):
            rows_T = None
            if len(members) > 1:
                rows_T = torch.cat([torch.arange(m.first_row, m.first_row + m.num_tokens) for m in some])
                rows_T = rows_T.to(q_THD.device, non_blocking=True)
                some = _consecutive(some)
            shape = TileShape(
                rows=rows, group=group, num_kv_heads=num_kv_heads, block_size=block_size, num_blocks=num_blocks
            )
            plan = TilePlan.make(some, batch, shape, window)
            laid.append((plan, block_mask(plan), rows_T))
        return tuple(laid)


def attend_tiles(
    q_1KLD: torch.Tensor,
    k_1KSD: torch.Tensor,
    v_1KSD: torch.Tensor,
    mask: flex.BlockMask,
    scale: float,
    options: FlexKernelOptions,
    num_parts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a plan's tiles, its parts merged: what is compiled as one.

    Returns:
        `(out [K, L / num_parts, D], lse [K, L / num_parts] float32)`; zeros and -inf where a row sees nothing.
    """
    if hasattr(flex, "AuxRequest"):
        out_1KLD, aux = flex.flex_attention(
            q_1KLD,
            k_1KSD,
            v_1KSD,
            block_mask=mask,
            scale=scale,
            kernel_options=options,
            return_aux=flex.AuxRequest(lse=True),
        )
        lse_1KL = aux.lse
    else:  # PyTorch 2.8
        out_1KLD, lse_1KL = flex.flex_attention(
            q_1KLD, k_1KSD, v_1KSD, block_mask=mask, scale=scale, kernel_options=options, return_lse=True
        )
    assert lse_1KL is not None
    out_KLD, lse_KL = out_1KLD[0], lse_1KL[0]
    if num_parts == 1:
        return out_KLD, lse_KL
    num_kv_heads, num_rows, head_dim = out_KLD.shape
    out_KPLD = out_KLD.view(num_kv_heads, num_parts, num_rows // num_parts, head_dim)
    lse_KPL = lse_KL.view(num_kv_heads, num_parts, num_rows // num_parts)
    lse_KL = lse_KPL.logsumexp(1)
    # Where no part sees anything, any finite stand-in makes all weights zero.
    base_K1L = lse_KL.masked_fill(lse_KL == -torch.inf, 0.0).unsqueeze(1)
    weights_KPL1 = (lse_KPL - base_K1L).exp().unsqueeze(-1)
    return (out_KPLD.float() * weights_KPL1).sum(1).to(out_KLD.dtype), lse_KL


def block_mask(plan: TilePlan) -> flex.BlockMask:
    """A plan for FlexAttention: which blocks a tile reads, and what its rows see of those not seen whole."""
    oldest_L, newest_L, sequence_L, position_BN = plan.oldest_L, plan.newest_L, plan.sequence_L, plan.position_BN
    block_size = plan.shape.block_size

    def sees(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        position = position_BN[sequence_L[q_idx], kv_idx // block_size] + kv_idx % block_size
        return (position >= oldest_L[q_idx]) & (position <= newest_L[q_idx])

    return flex.BlockMask(
        seq_lengths=(plan.oldest_L.shape[0], plan.shape.num_blocks * block_size),
        kv_num_blocks=plan.masked_N[None, None],
        kv_indices=plan.masked_NW[None, None],
        full_kv_num_blocks=plan.full_N[None, None],
        full_kv_indices=plan.full_NW[None, None],
        # Of the backward pass alone.
        q_num_blocks=None,
        q_indices=None,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(plan.shape.rows, block_size),
        mask_mod=sees,
    )


def _consecutive(members: list[Member]) -> list[Member]:
    """The same sequences with their rows moved together."""
    moved, first_row = [], 0
    for m in members:
        moved.append(Member(index=m.index, first_row=first_row, num_tokens=m.num_tokens, context_len=m.context_len))
        first_row += m.num_tokens
    return moved


def _reads_in_place(q_THD: torch.Tensor, kv: LayerKv) -> bool:
    return (
        kv.k.shape[1] % MIN_TILE_ROWS == 0
        and q_THD.shape[2] >= MIN_HEAD_DIM
        and q_THD.dtype == kv.k.dtype
        and kv.k.numel() < MAX_POOL_ELEMENTS
    )


def _tile_rows(num_rows: int, kv: LayerKv) -> int:
    """Rows of a tile for a sequence with so many: the least for a decode step, else what fits."""
    if num_rows <= MIN_TILE_ROWS:
        return MIN_TILE_ROWS
    return _fitting(MAX_TILE_ROWS, kv)


def _fitting(most: int, kv: LayerKv) -> int:
    """`most`, or the largest smaller power of two whose rows of K fit, and at least 16."""
    row_bytes = round_up(kv.k.shape[3]) * kv.k.element_size()
    return max(MIN_TILE_ROWS, min(most, MAX_TILE_BYTES // row_bytes))


def _kernel_options(shape: TileShape, kv: LayerKv) -> FlexKernelOptions:
    keys = min(_fitting(MAX_TILE_KEYS, kv), shape.block_size & -shape.block_size)
    # The kernel for short queries cuts the whole pool, not a context, among its programs; plans cut contexts.
    return {
        "BLOCK_M": shape.rows,
        "BLOCK_N": keys,
        "num_warps": 4,
        "num_stages": 2,
        "FORCE_USE_FLEX_ATTENTION": True,
    }


@torch.inference_mode()
def _largest_error(kernels: FlexKernels, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference from plain attention over two small batches, of output and LSE."""
    generator = torch.Generator().manual_seed(0)
    num_heads, head_dim, block_size = 4, 64, 16
    pool = PagedKv(
        num_layers=1,
        num_blocks=64,
        block_size=block_size,
        num_kv_heads=2,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
    )
    pool.data.copy_(torch.randn(pool.data.shape, generator=generator))
    kv, error = pool.layer(0), 0.0
    for lens in ([(1, 1), (1, 700)], [(40, 90), (1, 33), (3, 50)]):
        blocks = iter(torch.randperm(pool.num_blocks, generator=generator).tolist())
        sequences = tuple(
            SequencePlan(
                request_id="check",
                epoch=0,
                token_ids=(0,) * num_new,
                start=context_len - num_new,
                block_ids=tuple(next(blocks) for _ in range(-(-context_len // block_size))),
            )
            for num_new, context_len in lens
        )
        batch = ForwardBatch.from_plan(StepPlan(step=0, sequences=sequences), block_size, device)
        q_THD = torch.randn((batch.num_tokens, num_heads, head_dim), generator=generator).to(device, dtype)
        for window in (None, 20):
            results = (k.paged_attention(q_THD, kv, batch, 0.125, window) for k in (kernels, PlainKernels()))
            for got, want in zip(*results, strict=True):
                difference = float((got.float() - want.float()).abs().max())
                # Not a number compares as neither larger nor smaller: it must not get lost in a maximum.
                if not difference < torch.inf:
                    return torch.inf
                error = max(error, difference)
    return error
