"""The CPU kernels, compiled at first use; what they do not cover goes to `PlainKernels`."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from ctypes import c_long
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch

from anabranch.cache.paged_kv import LayerKv
from anabranch.kernels.arena import Arena
from anabranch.kernels.base import Kernels
from anabranch.kernels.batch_plans import BatchPlans
from anabranch.kernels.bindings import AttentionShape, bind_functions
from anabranch.kernels.block_attention import flash_block
from anabranch.kernels.combine import combine_slots
from anabranch.kernels.compiler import load_library
from anabranch.kernels.cpu_level import forced_level
from anabranch.kernels.flash import attend_flash
from anabranch.kernels.plain import PlainKernels, gather_context
from anabranch.kernels.program import Recorder
from anabranch.kernels.record import ProgramMemory, Recording
from anabranch.parallel.group import Group
from anabranch.step.batch import ForwardBatch
from anabranch.system.native_code import NativeUnavailable

log = logging.getLogger(__name__)

SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Elements from which a pass over memory takes long enough to let other threads have the GIL.
MIN_RELEASED_ELEMENTS = 1 << 16
# Sequences with more new tokens than this go to the tiled kernel, which gathers their keys first.
MAX_SHORT_TOKENS = 4
HEAD_DIM_STEP = 16
get_num_threads = torch.get_num_threads


@dataclass(frozen=True)
class _AttentionCall:
    """The arguments that the layers of one step share, converted once."""

    shape: AttentionShape
    long_sequences: tuple[int, ...]
    any_short: bool


def select_kernels(device: torch.device, dtype: torch.dtype, native: bool = True) -> Kernels:
    """The best kernels for a device and dtype; says in the log why where it is not compiled ones.

    Args:
        native: False keeps to PyTorch operations.
    """
    if not native:
        return PlainKernels()
    if device.type == "cuda":
        # Loads PyTorch's compiler, which takes a second that the CPU's kernels have no use for.
        from anabranch.kernels.flex import select_gpu_kernels

        return select_gpu_kernels(device, dtype)
    if dtype not in SUFFIXES:
        log.warning("no native CPU kernels for %s: running PyTorch operations", dtype)
        return PlainKernels()
    try:
        return NativeKernels(load_library(forced_level()), dtype)
    except NativeUnavailable as error:
        log.warning("no native CPU kernels, running PyTorch operations: %s", error)
        return PlainKernels()


class NativeKernels:
    """`Kernels` compiled for this CPU, for one dtype.

    Args:
        library: from `load_library`.
        dtype: float32 or bfloat16. Tensors of another dtype take the plain path.
    """

    name = "native"

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._plain = PlainKernels()
        self._dtype = dtype
        self._library = library
        self._functions = bind_functions(library, SUFFIXES[dtype])
        self._recorder: Recorder | None = None
        self._attention_calls = BatchPlans[_AttentionCall]()
        max_rows = getattr(library, f"ab_max_linear_rows_{SUFFIXES[dtype]}")
        max_rows.argtypes, max_rows.restype = [c_long], c_long
        self._max_rows_of = max_rows
        self._exact_from: int | None = library.ab_exact_from() or None
        self._max_rows: dict[int, int] = {}

    def rms_norm(self, x_TC: torch.Tensor, weight_C: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Kernels.rms_norm`."""
        shape, strides = x_TC.shape, x_TC.stride()
        if x_TC.dtype is not self._dtype or weight_C.dtype is not self._dtype or strides[-1] != 1 or len(shape) > 3:
            return self._plain.rms_norm(x_TC, weight_C, eps)
        out = torch.empty(shape, dtype=self._dtype)
        heads, stride_h = (shape[1], strides[1]) if len(shape) == 3 else (1, 0)
        self._functions.rms_norm.run(out.numel() >= MIN_RELEASED_ELEMENTS)(
            x_TC.data_ptr(),
            weight_C.data_ptr(),
            out.data_ptr(),
            strides[0],
            stride_h,
            shape[0],
            heads,
            shape[-1],
            eps,
            get_num_threads(),
        )
        return out

    def add_rms_norm(
        self, x_TC: torch.Tensor, residual_TC: torch.Tensor, weight_C: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.add_rms_norm`."""
        if x_TC.dtype is not self._dtype or not (x_TC.is_contiguous() and residual_TC.is_contiguous()):
            return self._plain.add_rms_norm(x_TC, residual_TC, weight_C, eps)
        total, out = (torch.empty(x_TC.shape, dtype=self._dtype) for _ in range(2))
        num_tokens, channels = x_TC.shape
        self._functions.add_rms_norm.run(num_tokens * channels >= MIN_RELEASED_ELEMENTS)(
            x_TC.data_ptr(),
            residual_TC.data_ptr(),
            weight_C.data_ptr(),
            total.data_ptr(),
            out.data_ptr(),
            num_tokens,
            channels,
            eps,
            get_num_threads(),
        )
        return total, out

    def linear(self, x_TC: torch.Tensor, weight_FC: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
        """See `Kernels.linear`."""
        return self._product(x_TC, weight_FC, bias_F, gated=False)

    def linear_silu_mul(
        self, x_TC: torch.Tensor, gate_up_FC: torch.Tensor, bias_F: torch.Tensor | None
    ) -> torch.Tensor:
        """See `Kernels.linear_silu_mul`."""
        return self._product(x_TC, gate_up_FC, bias_F, gated=True)

    def exact_from(self, x_TC: torch.Tensor, weight_FC: torch.Tensor) -> int | None:
        """See `Products.exact_from`."""
        return self._exact_from if self._covers(x_TC, weight_FC) else None

    def _covers(self, x_TC: torch.Tensor, weight_FC: torch.Tensor) -> bool:
        return (
            x_TC.dtype is self._dtype
            and weight_FC.dtype is self._dtype
            and x_TC.stride(1) == 1
            and weight_FC.is_contiguous()
        )

    def _product(
        self, x_TC: torch.Tensor, weight_FC: torch.Tensor, bias_F: torch.Tensor | None, gated: bool
    ) -> torch.Tensor:
        rows, channels = x_TC.shape
        max_rows = self._max_rows.get(channels)
        if max_rows is None:
            max_rows = self._max_rows[channels] = self._max_rows_of(channels)
        if rows > max_rows or not self._covers(x_TC, weight_FC):
            whole = self._plain.linear(x_TC, weight_FC, bias_F)
            return self.silu_mul(whole) if gated else whole
        features = weight_FC.shape[0]
        width = features // 2 if gated else features
        out = torch.empty((rows, width), dtype=self._dtype)
        self._functions.linear.released(
            x_TC.data_ptr(),
            weight_FC.data_ptr(),
            None if bias_F is None else bias_F.data_ptr(),
            out.data_ptr(),
            x_TC.stride(0),
            width,
            rows,
            features,
            channels,
            gated,
            get_num_threads(),
        )
        return out

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        """See `Kernels.silu_mul`."""
        if gate_up_TF.dtype is not self._dtype or gate_up_TF.stride(1) != 1:
            return self._plain.silu_mul(gate_up_TF)
        rows, width = gate_up_TF.shape
        out = torch.empty((rows, width // 2), dtype=self._dtype)
        self._functions.silu_mul.run(rows * width >= MIN_RELEASED_ELEMENTS)(
            gate_up_TF.data_ptr(), out.data_ptr(), gate_up_TF.stride(0), rows, width // 2, get_num_threads()
        )
        return out

    def rotary(self, x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
        """See `Kernels.rotary`; returns a new tensor."""
        stride_t, stride_h, stride_d = x_THD.stride()
        if x_THD.dtype is not self._dtype or stride_d != 1 or not (cos_TR.is_contiguous() and sin_TR.is_contiguous()):
            return self._plain.rotary(x_THD, cos_TR, sin_TR)
        num_tokens, heads, head_dim = shape = x_THD.shape
        out = torch.empty(shape, dtype=self._dtype)
        self._functions.rotary.run(out.numel() >= MIN_RELEASED_ELEMENTS)(
            x_THD.data_ptr(),
            cos_TR.data_ptr(),
            sin_TR.data_ptr(),
            out.data_ptr(),
            stride_t,
            stride_h,
            num_tokens,
            heads,
            head_dim,
            cos_TR.shape[-1],
            get_num_threads(),
        )
        return out

    def store_kv(self, k_TKD: torch.Tensor, v_TKD: torch.Tensor, kv: LayerKv, slots_T: torch.Tensor) -> None:
        """See `Kernels.store_kv`."""
        k_t, k_h, k_d = k_TKD.stride()
        v_t, v_h, v_d = v_TKD.stride()
        num_tokens, heads, head_dim = k_TKD.shape
        if (
            k_TKD.dtype is not kv.k.dtype
            or v_TKD.dtype is not kv.v.dtype
            or k_d != 1
            or v_d != 1
            or not kv.k.is_contiguous()
            or not kv.v.is_contiguous()
        ):
            return self._plain.store_kv(k_TKD, v_TKD, kv, slots_T)
        size = kv.k.element_size()
        self._functions.store_kv.run(num_tokens * heads * head_dim >= MIN_RELEASED_ELEMENTS)(
            k_TKD.data_ptr(),
            v_TKD.data_ptr(),
            kv.k.data_ptr(),
            kv.v.data_ptr(),
            slots_T.data_ptr(),
            k_t * size,
            k_h * size,
            v_t * size,
            v_h * size,
            num_tokens,
            heads,
            head_dim * size,
            get_num_threads(),
        )

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
        k_t, k_h, k_d = k_TKD.stride()
        v_t, v_h, v_d = v_TKD.stride()
        _, _, num_rows, num_heads, head_dim = room_L2RKD.shape
        if k_TKD.dtype is not v_TKD.dtype or k_d != 1 or v_d != 1 or k_h != head_dim or v_h != head_dim:
            return self._plain.export_kv(k_TKD, v_TKD, rows, heads, room_L2RKD, index)
        size = k_TKD.element_size()
        row_bytes = num_heads * head_dim * size
        self._functions.export_kv.run(num_rows * num_heads * head_dim >= MIN_RELEASED_ELEMENTS)(
            k_TKD.data_ptr() + heads.start * head_dim * size,
            v_TKD.data_ptr() + heads.start * head_dim * size,
            room_L2RKD.data_ptr() + index * 2 * num_rows * row_bytes,
            None if isinstance(rows, slice) else rows.data_ptr(),
            rows.start if isinstance(rows, slice) else 0,
            num_rows,
            k_t * size,
            v_t * size,
            row_bytes,
            get_num_threads(),
        )

    def import_kv(self, kv_L2TKD: torch.Tensor, pool_L2NBKD: torch.Tensor, slots_T: torch.Tensor) -> None:
        """See `Kernels.import_kv`."""
        num_layers, _, num_tokens, heads, head_dim = kv_L2TKD.shape
        plane_stride, _, slot_stride = pool_L2NBKD.stride()[1:4]
        strides = (2 * plane_stride, plane_stride, pool_L2NBKD.shape[3] * slot_stride, slot_stride, head_dim, 1)
        if kv_L2TKD.dtype is not pool_L2NBKD.dtype or pool_L2NBKD.stride() != strides or not kv_L2TKD.is_contiguous():
            return self._plain.import_kv(kv_L2TKD, pool_L2NBKD, slots_T)
        size = pool_L2NBKD.element_size()
        self._functions.import_kv.run(kv_L2TKD.numel() >= MIN_RELEASED_ELEMENTS)(
            kv_L2TKD.data_ptr(),
            pool_L2NBKD.data_ptr(),
            slots_T.data_ptr(),
            2 * num_layers,
            plane_stride * size,
            slot_stride * size,
            num_tokens,
            heads * head_dim * size,
        )

    def paged_attention(
        self, q_THD: torch.Tensor, kv: LayerKv, batch: ForwardBatch, scale: float, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels.paged_attention`."""
        head_dim = q_THD.shape[2]
        if q_THD.dtype is not self._dtype or kv.k.dtype is not self._dtype or q_THD.stride(2) != 1:
            return self._plain.paged_attention(q_THD, kv, batch, scale, window)
        if head_dim % HEAD_DIM_STEP or scale <= 0:
            return self._plain.paged_attention(q_THD, kv, batch, scale, window)
        key = (q_THD.stride(), kv.k.shape, scale, window)
        call = self._attention_calls.get(batch, key, lambda: self._plan_attention(q_THD, kv, batch, scale, window))
        out_THD = torch.empty(q_THD.shape, dtype=self._dtype)
        lse_TH = torch.empty(q_THD.shape[:2], dtype=torch.float32)
        arguments = (
            q_THD.data_ptr(),
            kv.k.data_ptr(),
            kv.v.data_ptr(),
            batch.block_tables_BN.data_ptr(),
            batch.query_starts_B1.data_ptr(),
            batch.context_lens_B.data_ptr(),
            out_THD.data_ptr(),
            lse_TH.data_ptr(),
            call.shape,
            get_num_threads(),
        )
        if call.any_short:
            self._functions.attention_short.released(*arguments)
        if call.long_sequences and self._functions.attention_long.released(*arguments) != 0:
            for b in call.long_sequences:
                rows = slice(*batch.query_starts[b : b + 2])
                k_CKD, v_CKD = gather_context(kv, batch.block_tables_BN[b], batch.context_lens[b])
                out_THD[rows], lse_TH[rows] = attend_flash(q_THD[rows], k_CKD, v_CKD, scale, window)
        return out_THD, lse_TH

    def block_attention(
        self, q_THD: torch.Tensor, k_CKD: torch.Tensor, v_CKD: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `BlockKernels.block_attention`."""
        num_tokens, num_heads, head_dim = q_THD.shape
        num_keys, num_kv_heads = k_CKD.shape[:2]
        tensors = (q_THD, k_CKD, v_CKD)
        if (
            any(x.dtype is not self._dtype for x in tensors)
            or not (k_CKD.is_contiguous() and v_CKD.is_contiguous() and q_THD.stride(2) == 1)
            or head_dim % HEAD_DIM_STEP
            or scale <= 0
        ):
            return flash_block(q_THD, k_CKD, v_CKD, scale)
        # The keys are one block of a pool of one block.
        table, starts, lens = (torch.tensor(x, dtype=torch.int32) for x in ([0], [0, num_tokens], [num_keys]))
        shape = AttentionShape(
            *q_THD.stride()[:2],
            1,
            1,
            num_heads,
            num_kv_heads,
            head_dim,
            num_keys,
            0,
            MAX_SHORT_TOKENS,
            1,
            scale,
        )
        out_THD = torch.empty(q_THD.shape, dtype=self._dtype)
        lse_TH = torch.empty(q_THD.shape[:2], dtype=torch.float32)
        functions = self._functions
        run = functions.attention_short if num_tokens <= MAX_SHORT_TOKENS else functions.attention_long
        code = run.released(
            q_THD.data_ptr(),
            k_CKD.data_ptr(),
            v_CKD.data_ptr(),
            table.data_ptr(),
            starts.data_ptr(),
            lens.data_ptr(),
            out_THD.data_ptr(),
            lse_TH.data_ptr(),
            shape,
            get_num_threads(),
        )
        return flash_block(q_THD, k_CKD, v_CKD, scale) if code else (out_THD, lse_TH)

    def _plan_attention(
        self, q_THD: torch.Tensor, kv: LayerKv, batch: ForwardBatch, scale: float, window: int | None
    ) -> _AttentionCall:
        starts = batch.query_starts
        num_new = [stop - start for start, stop in pairwise(starts)]
        shape = AttentionShape(
            *q_THD.stride()[:2],
            batch.block_tables_BN.stride(0),
            batch.num_sequences,
            q_THD.shape[1],
            *kv.k.shape[2:],
            kv.k.shape[1],
            window or 0,
            MAX_SHORT_TOKENS,
            0,
            scale,
        )
        return _AttentionCall(
            shape=shape,
            long_sequences=tuple(b for b, n in enumerate(num_new) if n > MAX_SHORT_TOKENS),
            any_short=any(n <= MAX_SHORT_TOKENS for n in num_new),
        )

    def experts(
        self,
        x_TC: torch.Tensor,
        weights_TS: torch.Tensor,
        experts_TS: torch.Tensor,
        gate_up_EFC: torch.Tensor,
        down_ECF: torch.Tensor,
    ) -> torch.Tensor:
        """See `Kernels.experts`; tokens are grouped by expert, and each choice's answer is summed in float32."""
        num_tokens, num_chosen = experts_TS.shape
        chosen_X = experts_TS.flatten()
        order_X = chosen_X.argsort(stable=True)
        rows_XC = x_TC[order_X // num_chosen]
        answers_XC = x_TC.new_zeros((num_tokens * num_chosen, x_TC.shape[1]))
        start = 0
        for expert, group in groupby(chosen_X[order_X].tolist()):
            stop = start + sum(1 for _ in group)
            if expert >= 0:
                hidden = self.linear_silu_mul(rows_XC[start:stop], gate_up_EFC[expert], None)
                answers_XC[order_X[start:stop]] = self.linear(hidden, down_ECF[expert], None)
            start = stop
        answers_TSC = answers_XC.view(num_tokens, num_chosen, x_TC.shape[1])
        return combine_slots(answers_TSC, weights_TS)

    def argmax(self, x_SV: torch.Tensor) -> torch.Tensor:
        """See `Kernels.argmax`."""
        if x_SV.dtype is not self._dtype or x_SV.stride(1) != 1 or not x_SV.shape[1]:
            return self._plain.argmax(x_SV)
        rows, width = x_SV.shape
        out_S = torch.empty((rows,), dtype=torch.int64)
        self._functions.argmax.run(x_SV.numel() >= MIN_RELEASED_ELEMENTS)(
            x_SV.data_ptr(), out_S.data_ptr(), x_SV.stride(0), rows, width, get_num_threads()
        )
        return out_S

    def all_reduce(self, x: torch.Tensor, group: Group) -> torch.Tensor:
        """See `Kernels.all_reduce`."""
        if self._recorder is not None:
            self._recorder.reduce(x, group)
        return group.all_reduce(x)

    def program_memory(self) -> ProgramMemory:
        """See `StepRecorder.program_memory`."""
        return Arena()

    def record(self, step: Callable[[], torch.Tensor], memory: ProgramMemory) -> Recording:
        """See `StepRecorder.record`."""
        assert isinstance(memory, Arena)
        plain, recorder = self._functions, Recorder(self._library, memory)
        self._functions, self._recorder = plain.watched(recorder), recorder
        try:
            with recorder:
                output = step()
        finally:
            self._functions, self._recorder = plain, None
        return recorder.finish(output)
