"""Attention by FlexAttention equals the reference: uncompiled, on the CPU; and so do the lists that GPUs read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from anabranch.cache.paged_kv import LayerKv
from anabranch.kernels import batch_plans, flex, flex_plan
from anabranch.kernels.block_attention import BlockKernels
from anabranch.kernels.compiler import native_status
from anabranch.kernels.flex import FlexKernels, FlexUnavailable
from anabranch.kernels.library import attend_library, block_library
from anabranch.kernels.native import select_kernels
from anabranch.kernels.plain import PlainKernels

pytestmark = pytest.mark.unit
plain = PlainKernels()
MakeCase = Callable[..., Any]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
LENS = [(1, 1), (4, 9), (1, 33), (17, 17), (30, 90), (1, 16), (1, 200)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(kernels: FlexKernels, case: Any, window: int | None) -> None:
    with torch.inference_mode():
        out, lse = kernels.paged_attention(case.q, case.kv, case.batch, 0.3, window)
        want_out, want_lse = plain.paged_attention(case.q, case.kv, case.batch, 0.3, window)
    assert (out.dtype, lse.dtype) == (case.q.dtype, torch.float32)
    torch.testing.assert_close(out, want_out, **TOLERANCE[case.q.dtype])
    torch.testing.assert_close(lse, want_lse, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(9, 3, 64, 16), (4, 1, 20, 32), (3, 3, 18, 48), (40, 2, 32, 16), (6, 2, 16, 128)],
)
def test_paged_attention(
    make_case: MakeCase,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    case = make_case(lens=LENS, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
    check(FlexKernels(compiled=False), case, window)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lens", [[(1, 900)], [(1, 300), (1, 5)], [(40, 500), (1, 90)]])
def test_contexts_cut_into_parts(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch, lens: list[tuple[int, int]], window: int | None
) -> None:
    monkeypatch.setattr(flex_plan, "MIN_PART_TOKENS", 64)
    kernels = FlexKernels(compiled=False)
    case = make_case(lens=lens, heads=6, kv_heads=2, head_dim=16, block_size=16)
    check(kernels, case, window)
    ((_, laid),) = kernels._plans._plans.values()
    assert any(plan.num_parts > 1 for plan, _, _ in laid)


@pytest.mark.parametrize(("block_size", "head_dim"), [(1, 16), (5, 16), (16, 8)])
def test_what_cannot_be_read_in_place_is_gathered(make_case: MakeCase, block_size: int, head_dim: int) -> None:
    case = make_case(lens=LENS, heads=6, kv_heads=2, head_dim=head_dim, block_size=block_size)
    kernels = FlexKernels(compiled=False)
    check(kernels, case, None)
    check(kernels, case, 7)
    assert not kernels._plans._plans


@pytest.mark.parametrize("window", [None, 1, 30, 64])
@pytest.mark.parametrize("part_tokens", [32, 512])
def test_lists_of_blocks_say_what_the_mask_says(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch, part_tokens: int, window: int | None
) -> None:
    """A GPU reads the listed blocks alone, those called full without asking the mask; the CPU asks everywhere."""
    monkeypatch.setattr(flex_plan, "MIN_PART_TOKENS", part_tokens)
    case = make_case(lens=LENS, heads=6, kv_heads=2, head_dim=16, block_size=16)
    kernels = FlexKernels(compiled=False)
    kernels.paged_attention(case.q, case.kv, case.batch, 0.3, window)
    ((_, laid),) = kernels._plans._plans.values()
    num_seen = 0
    for plan, mask, _ in laid:
        rows, size = mask.BLOCK_SIZE
        by_mask = create_mask(mask.mask_mod, 1, 1, *mask.seq_lengths, device="cpu")[0, 0]
        by_lists = torch.zeros_like(by_mask)
        for tile in range(plan.masked_N.shape[0]):
            q = slice(tile * rows, (tile + 1) * rows)
            for block in plan.masked_NW[tile, : int(plan.masked_N[tile])].tolist():
                keys = slice(block * size, (block + 1) * size)
                by_lists[q, keys] = by_mask[q, keys]
            for block in plan.full_NW[tile, : int(plan.full_N[tile])].tolist():
                by_lists[q, block * size : (block + 1) * size] = True
        # Rows of padding see what their tile's full blocks hold; nobody reads them.
        real = plan.newest_L >= 0
        assert torch.equal(by_lists[real], by_mask[real])
        num_seen += int(by_mask.sum())
    group = 3
    contexts = zip(pairwise(case.batch.query_starts), case.batch.context_lens, strict=True)
    positions = [p for (start, stop), length in contexts for p in range(length - (stop - start), length)]
    assert num_seen == group * sum(min(p + 1, window or p + 1) for p in positions)


def test_layers_share_a_plan_and_batches_do_not(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = flex_plan.TilePlan.make
    monkeypatch.setattr(flex.TilePlan, "make", lambda *args: made.append(1) or make(*args))
    kernels = FlexKernels(compiled=False)
    first, second = (
        make_case(lens=[(1, 20), (1, 40)], heads=2, kv_heads=1, head_dim=16, block_size=16, seed=s) for s in (0, 1)
    )
    for case in (first, second, first):
        for window in (None, 9, None):
            check(kernels, case, window)
    assert len(made) == 4
    monkeypatch.setattr(batch_plans, "MAX_PLANS", 1)
    check(kernels, second, 3)
    assert len(kernels._plans._plans) == 1


def test_few_shapes_are_compiled(make_case: MakeCase) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    kernels = FlexKernels(compiled=False)
    kernels._attend = torch.compile(flex.attend_tiles, fullgraph=True, backend=counter)

    def run(lens: list[tuple[int, int]], window: int | None, seed: int) -> int:
        case = make_case(lens=lens, heads=6, kv_heads=2, head_dim=16, block_size=16, seed=seed)
        # Every step has the same pool.
        k, v = torch.zeros(2, 200, 16, 2, 16)
        k[: case.kv.k.shape[0]], v[: case.kv.v.shape[0]] = case.kv.k, case.kv.v
        case = type(case)(q=case.q, kv=LayerKv(k, v), batch=case.batch)
        check(kernels, case, window)
        return counter.frame_count

    warm = [[(1, 20)], [(1, 60)] * 3, [(1, 600)], [(1, 600)] * 5, [(40, 50)], [(70, 1100)]]
    for seed, lens in enumerate(warm):
        compiled = run(lens, None, seed)
    assert compiled <= 8
    for seed, lens in enumerate([[(1, 9)], [(1, 100)] * 7, [(1, 1700)], [(1, 30), (1, 800)], [(90, 300), (1, 8)]]):
        assert run(lens, (None, 5)[seed % 2], 10 + seed) == compiled
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_for_the_cpu_it_reads_the_lists(make_case: MakeCase) -> None:
    """The compiled kernels of the CPU read the listed blocks alone, as those of a GPU do; they give no LSE."""
    if not native_status().usable:
        pytest.skip(native_status().reason)
    kernels = FlexKernels(compiled=False)
    case = make_case(lens=[(30, 190), (17, 17)], heads=6, kv_heads=2, head_dim=32, block_size=32)
    with torch.inference_mode():
        want, _ = plain.paged_attention(case.q, case.kv, case.batch, 0.3, 120)
        kernels.paged_attention(case.q, case.kv, case.batch, 0.3, 120)
        ((_, laid),) = kernels._plans._plans.values()
        k, v = (x.transpose(0, 1).unsqueeze(0) for x in case.kv.slots())
        compiled = torch.compile(flex_attention, dynamic=False)
        for plan, mask, _ in laid:
            assert int(plan.full_N.sum()) and int(plan.masked_N.sum())
            # The CPU's kernels want room for every block in the lists.
            mask = BlockMask(
                seq_lengths=mask.seq_lengths,
                kv_num_blocks=mask.kv_num_blocks,
                kv_indices=functional.pad(mask.kv_indices, (0, plan.shape.num_blocks)),
                full_kv_num_blocks=mask.full_kv_num_blocks,
                full_kv_indices=functional.pad(mask.full_kv_indices, (0, plan.shape.num_blocks)),
                q_num_blocks=None,
                q_indices=None,
                full_q_num_blocks=None,
                full_q_indices=None,
                BLOCK_SIZE=mask.BLOCK_SIZE,
                mask_mod=mask.mask_mod,
            )
            out = compiled(plan.gather(case.q), k, v, block_mask=mask, scale=0.3)
            torch.testing.assert_close(plan.scatter(out[0]), want, rtol=1e-4, atol=1e-4)


def test_on_cuda_what_fails_or_is_wrong_leaves_the_plain_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda, dtype = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(flex, "has_triton", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert select_kernels(cuda, dtype).name == "plain"
    assert "no Triton for this device" in caplog.text
    monkeypatch.setattr(flex, "has_triton", lambda: True)
    monkeypatch.setattr(flex, "_largest_error", lambda *_: 0.5)
    with pytest.raises(FlexUnavailable, match=r"off by 0\.5 from plain attention"):
        flex.load_flex(cuda, dtype)

    def fail(*_: object) -> float:
        raise RuntimeError("out of shared memory\nat length")

    monkeypatch.setattr(flex, "_largest_error", fail)
    with pytest.raises(FlexUnavailable, match=r"compiling FlexAttention failed: RuntimeError: out of shared memory$"):
        flex.load_flex(cuda, dtype)
    monkeypatch.setattr(flex, "_largest_error", lambda *_: 1e-3)
    assert select_kernels(cuda, dtype).name == "flex"
    assert select_kernels(cuda, dtype, native=False).name == "plain"


def test_the_check_at_the_start_passes_uncompiled_and_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert flex._largest_error(FlexKernels(compiled=False), cpu, torch.float32) < 1e-4
    assert flex._largest_error(FlexKernels(compiled=False), cpu, torch.bfloat16) < flex.TOLERANCES[torch.bfloat16]
    wrong = FlexKernels(compiled=False)
    wrong._attend = lambda *args: tuple(x + 0.01 for x in flex.attend_tiles(*args))  # type: ignore[assignment,return-value]
    assert flex._largest_error(wrong, cpu, torch.float32) > 5e-3
    wrong._attend = lambda *args: tuple(x * torch.nan for x in flex.attend_tiles(*args))  # type: ignore[assignment,return-value]
    assert flex._largest_error(wrong, cpu, torch.float32) == torch.inf


def test_block_attention_on_the_cpu_is_plain() -> None:
    kernels = FlexKernels(compiled=False)
    assert isinstance(kernels, BlockKernels)
    q, k, v = torch.randn(9, 6, 16), torch.randn(20, 2, 16), torch.randn(20, 2, 16)
    got, want = kernels.block_attention(q, k, v, 0.3), by_definition(q, k, v)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.einsum("thd,chd->thc", q, k.repeat_interleave(3, 1)) * 0.3
    return torch.einsum("thc,chd->thd", scores.softmax(-1), v.repeat_interleave(3, 1)), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 20])
def test_the_librarys_kernels_take_these_shapes(dtype: torch.dtype, head_dim: int) -> None:
    """What each of them returns on a GPU has the shape and the dtype of the contract; no GPU computes here."""
    q = torch.empty(7, 6, head_dim, dtype=dtype, device="meta")
    k, v = (torch.empty(40, 2, head_dim, dtype=dtype, device="meta") for _ in range(2))
    for function in (block_library, attend_library):
        out, lse = function(q, k, v, 0.3)
        assert (out.shape, out.dtype) == (q.shape, dtype)
        assert (lse.shape, lse.dtype) == (q.shape[:2], torch.float32)
