"""The compiled kernels equal the reference, at every level of machine that this one can pretend to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from anabranch.errors import ConfigError
from anabranch.kernels.compiler import load_library, native_status
from anabranch.kernels.cpu_level import LEVELS, CpuLevel
from anabranch.kernels.native import NativeKernels
from anabranch.kernels.plain import PlainKernels

# Whoever comes first compiles.
pytestmark = [pytest.mark.unit, pytest.mark.timeout(600)]
plain = PlainKernels()
MakeCase = Callable[..., Any]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=LEVELS, ids=lambda level: str(level.name))
def level(request: pytest.FixtureRequest) -> CpuLevel:
    if not native_status().usable:
        pytest.skip(native_status().reason)
    return request.param


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def native(level: CpuLevel, dtype: torch.dtype) -> NativeKernels:
    try:
        return NativeKernels(load_library(level), dtype)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got, want, **TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("rows", "channels"), [(1, 576), (3, 16), (5, 40), (2, 7), (65, 576), (130, 64), (1, 33), (4, 1), (0, 32)]
)
def test_rms_norm(native: NativeKernels, dtype: torch.dtype, rows: int, channels: int) -> None:
    x = (torch.randn(rows, channels) * 3).to(dtype)
    weight = torch.randn(channels).to(dtype)
    close(native.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5), dtype)
    heads = (torch.randn(rows, 5, channels) * 3).to(dtype)[:, 1:4]
    close(native.rms_norm(heads, weight, 1e-6), plain.rms_norm(heads, weight, 1e-6), dtype)
    residual = torch.randn(rows, channels).to(dtype)
    for got, want in zip(
        native.add_rms_norm(x, residual, weight, 1e-5), plain.add_rms_norm(x, residual, weight, 1e-5), strict=True
    ):
        close(got, want, dtype)


@pytest.mark.parametrize(
    ("features", "channels"),
    [(960, 576), (48, 32), (70, 64), (33, 96), (6, 40), (16, 7), (130, 33), (1, 32), (2, 1), (514, 160)],
)
def test_linear(native: NativeKernels, dtype: torch.dtype, features: int, channels: int) -> None:
    weight = (torch.randn(features, channels) / channels**0.5).to(dtype)
    for rows in (1, 2, 3, 4, 5, 8, 16, 17, 33, 64, 65, 100, 300):
        x = torch.randn(rows, channels).to(dtype)
        for bias in (None, torch.randn(features).to(dtype)):
            want = plain.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype)
            close(native.linear(x, weight, bias), want, dtype)
            if features % 2 == 0:
                close(native.linear_silu_mul(x, weight, bias), plain.silu_mul(want), dtype)


@pytest.mark.parametrize("num_threads", [2, 3])
@pytest.mark.parametrize("rows", [1, 4, 20, 300])
def test_linear_by_several_threads(native: NativeKernels, dtype: torch.dtype, rows: int, num_threads: int) -> None:
    x = torch.randn(rows, 96).to(dtype)
    weight = (torch.randn(560, 96) / 10).to(dtype)
    alone = native.linear(x, weight, None), native.linear_silu_mul(x, weight, None)
    torch.set_num_threads(num_threads)
    assert torch.equal(native.linear(x, weight, None), alone[0])
    assert torch.equal(native.linear_silu_mul(x, weight, None), alone[1])


def test_linear_of_strided_rows(native: NativeKernels, dtype: torch.dtype) -> None:
    wide = torch.randn(20, 3 * 64).to(dtype)
    weight = torch.randn(48, 64).to(dtype) / 8
    for rows in (1, 4, 20):
        x = wide[:rows, 64:128]
        close(native.linear(x, weight, None), plain.linear(x, weight, None), dtype)
        turned = torch.randn(64, rows).to(dtype).t()
        close(native.linear(turned, weight, None), plain.linear(turned, weight, None), dtype)


def test_linear_of_no_rows(native: NativeKernels, dtype: torch.dtype) -> None:
    got = native.linear(torch.empty(0, 64, dtype=dtype), torch.randn(48, 64).to(dtype), None)
    assert got.shape == (0, 48)


def test_another_dtype_takes_the_plain_path(native: NativeKernels, dtype: torch.dtype) -> None:
    other = torch.float64
    x, weight = torch.randn(3, 32, dtype=other), torch.randn(8, 32, dtype=other)
    assert torch.equal(native.linear(x, weight, None), plain.linear(x, weight, None))
    assert torch.equal(native.rms_norm(x, weight[0], 1e-5), plain.rms_norm(x, weight[0], 1e-5))


@pytest.mark.parametrize(("rows", "width"), [(1, 3072), (3, 64), (7, 14), (2, 2), (40, 3072), (0, 8)])
def test_silu_mul(native: NativeKernels, dtype: torch.dtype, rows: int, width: int) -> None:
    x = (torch.randn(rows, width) * 6).to(dtype)
    close(native.silu_mul(x), plain.silu_mul(x), dtype)


def test_silu_of_great_numbers(native: NativeKernels, dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e4, -100.0, -90.0, -87.0, -20.0, 0.0, 20.0, 87.0, 100.0, 1e4] * 2)
    x = torch.cat((gate, torch.ones_like(gate)))[None].to(dtype)
    close(native.silu_mul(x), plain.silu_mul(x), dtype)


@pytest.mark.parametrize(("heads", "head_dim"), [(9, 64), (1, 16), (3, 80), (2, 128), (5, 8), (2, 6)])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_rotary(native: NativeKernels, dtype: torch.dtype, rows: int, heads: int, head_dim: int) -> None:
    x = torch.randn(rows, heads + 2, head_dim).to(dtype)[:, 1:-1]
    angle = (torch.randn(rows, head_dim // 2) * 3).repeat(1, 2)
    close(native.rotary(x, angle.cos(), angle.sin()), plain.rotary(x, angle.cos(), angle.sin()), dtype)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(128, 96), (80, 32), (64, 2), (8, 6), (7, 4)])
def test_partial_rotary(native: NativeKernels, dtype: torch.dtype, head_dim: int, rotary_dim: int) -> None:
    x = torch.randn(5, 6, head_dim).to(dtype)[:, 1:-1]
    angle = (torch.randn(5, rotary_dim // 2) * 3).repeat(1, 2)
    found = native.rotary(x, angle.cos(), angle.sin())
    close(found, plain.rotary(x, angle.cos(), angle.sin()), dtype)
    assert torch.equal(found[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(3, 64), (1, 80), (7, 5)])
def test_store_kv(native: NativeKernels, dtype: torch.dtype, make_case: MakeCase, kv_heads: int, head_dim: int) -> None:
    sizes = {"lens": [(3, 7), (1, 1), (9, 12)], "heads": kv_heads, "kv_heads": kv_heads, "head_dim": head_dim}
    ours, theirs = (make_case(**sizes, block_size=4, dtype=dtype) for _ in range(2))
    qkv = torch.randn(13, 3 * kv_heads, head_dim).to(dtype)
    k, v = qkv[:, kv_heads : 2 * kv_heads], qkv[:, 2 * kv_heads :]
    native.store_kv(k, v, ours.kv, ours.batch.slots_T)
    plain.store_kv(k, v, theirs.kv, theirs.batch.slots_T)
    assert torch.equal(ours.kv.k, theirs.kv.k)
    assert torch.equal(ours.kv.v, theirs.kv.v)


ROWS = {"a span": slice(2, 9), "runs": torch.tensor([0, 1, 2, 5, 8, 9, 10]), "one": torch.tensor([6])}


@pytest.mark.parametrize("rows", ROWS.values(), ids=list(ROWS))
@pytest.mark.parametrize("heads", [slice(0, 3), slice(1, 3)])
@pytest.mark.parametrize("apart", [False, True])
def test_export_kv(
    native: NativeKernels, dtype: torch.dtype, rows: slice | torch.Tensor, heads: slice, apart: bool
) -> None:
    """Some rows and heads, of tensors of their own or as they lie beside the queries."""
    qkv = torch.randn(11, 9, 8).to(dtype)
    k, v = (qkv[:, first : first + 3] for first in (3, 6))
    if apart:
        k, v = k.contiguous(), v.contiguous()
    num_rows = 7 if isinstance(rows, slice) else rows.shape[0]
    ours, theirs = (torch.zeros(3, 2, num_rows, heads.stop - heads.start, 8, dtype=dtype) for _ in range(2))
    for kernels, room in ((native, ours), (plain, theirs)):
        kernels.export_kv(k, v, rows, heads, room, 1)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours[1, 0], k[rows][:, heads])
    assert torch.equal(ours[1, 1], v[rows][:, heads])
    assert not ours[::2].any()


@pytest.mark.parametrize("head_dim", [64, 8, 5])
@pytest.mark.parametrize("heads", [slice(0, 3), slice(0, 2), slice(2, 3)])
def test_import_kv(native: NativeKernels, dtype: torch.dtype, heads: slice, head_dim: int) -> None:
    """Some layers of some heads, from ranks that hold no others."""
    slots_T = torch.tensor([3, 17, 0, 8, 9, 10, 11])
    kv = torch.randn(2, 2, 7, heads.stop - heads.start, head_dim).to(dtype)
    ours, theirs = (torch.zeros(4, 2, 5, 4, 3, head_dim, dtype=dtype) for _ in range(2))
    for kernels, pool in ((native, ours), (plain, theirs)):
        kernels.import_kv(kv, pool[1:3, ..., heads, :], slots_T)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours[1:3].flatten(2, 3)[:, :, slots_T][..., heads, :], kv)


BATCHES = {
    "one decode": [(1, 1)],
    "decodes": [(1, 1), (1, 70), (1, 16), (1, 17), (1, 300)],
    "long decode": [(1, 1500)],
    "prompt": [(33, 33)],
    "prompts": [(5, 5), (130, 130), (16, 16), (7, 7)],
    "chunk": [(40, 200)],
    "mixed": [(1, 90), (37, 150), (2, 40), (4, 4), (64, 64), (1, 257), (160, 301)],
}


SHAPES = [(9, 3, 64, 16), (1, 1, 16, 4), (7, 7, 80, 1), (14, 2, 128, 32), (5, 1, 32, 7), (8, 4, 24, 16)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size"), SHAPES)
def test_paged_attention(
    native: NativeKernels,
    dtype: torch.dtype,
    make_case: MakeCase,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block_size": block_size, "dtype": dtype}
    scale = head_dim**-0.5
    for lens in BATCHES.values():
        case = make_case(lens=lens, **shape)
        for window in (None, 1, 21, 140):
            out, lse = native.paged_attention(case.q, case.kv, case.batch, scale, window)
            want_out, want_lse = plain.paged_attention(case.q, case.kv, case.batch, scale, window)
            close(out, want_out, dtype)
            torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_paged_attention_by_several_threads(
    native: NativeKernels, dtype: torch.dtype, make_case: MakeCase, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    for lens in BATCHES.values():
        case = make_case(lens=lens, heads=9, kv_heads=3, head_dim=64, block_size=16, dtype=dtype)
        got = native.paged_attention(case.q, case.kv, case.batch, 0.125, None)
        want = plain.paged_attention(case.q, case.kv, case.batch, 0.125, None)
        close(got[0], want[0], dtype)
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


def test_paged_attention_of_strided_queries(native: NativeKernels, dtype: torch.dtype, make_case: MakeCase) -> None:
    case = make_case(lens=[(1, 30), (20, 40)], heads=6, kv_heads=2, head_dim=32, block_size=8, dtype=dtype)
    wide = torch.randn(21, 10, 32).to(dtype)
    wide[:, 2:8] = case.q
    got = native.paged_attention(wide[:, 2:8], case.kv, case.batch, 0.2, None)
    want = plain.paged_attention(case.q, case.kv, case.batch, 0.2, None)
    close(got[0], want[0], dtype)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


def test_paged_attention_with_far_scores(native: NativeKernels, dtype: torch.dtype, make_case: MakeCase) -> None:
    case = make_case(lens=[(1, 200), (50, 200)], heads=3, kv_heads=3, head_dim=32, block_size=16, dtype=dtype)
    got = native.paged_attention(case.q * 30, case.kv, case.batch, 1.0, None)
    want = plain.paged_attention(case.q * 30, case.kv, case.batch, 1.0, None)
    assert bool(got[0].isfinite().all())
    # A score of hundreds carries its rounding, some 1e-5 of it, into the weight.
    torch.testing.assert_close(got[0], want[0], rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-3)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-3)


def test_what_is_no_number_shows(native: NativeKernels, dtype: torch.dtype, make_case: MakeCase) -> None:
    """Broken weights end requests by name; attention must not average what is broken away."""
    case = make_case(lens=[(1, 200), (50, 120)], heads=6, kv_heads=2, head_dim=64, block_size=16, dtype=dtype)
    for b in range(2):
        # The first token, which all see, in one of two KV heads.
        case.kv.k[case.batch.block_tables_BN[b, 0], 0, 1] = torch.nan
    out, _ = native.paged_attention(case.q, case.kv, case.batch, 0.125, None)
    want, _ = plain.paged_attention(case.q, case.kv, case.batch, 0.125, None)
    assert torch.equal(out.isnan(), want.isnan())
    assert bool(out[:, 3:].isnan().all()) and not bool(out[:, :3].isnan().any())


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 40])
def test_experts(native: NativeKernels, dtype: torch.dtype, num_tokens: int) -> None:
    x = torch.randn(num_tokens, 64).to(dtype)
    gate_up, down = (torch.randn(6, 96, 64) / 8).to(dtype), (torch.randn(6, 64, 48) / 7).to(dtype)
    experts = torch.randint(-1, 6, (num_tokens, 3))
    weights = torch.rand(num_tokens, 3)
    got = native.experts(x, weights, experts, gate_up, down)
    close(got, plain.experts(x, weights, experts, gate_up, down), dtype)


@pytest.mark.parametrize(("rows", "width"), [(1, 49152), (3, 101), (2, 1), (5, 16), (4, 70)])
def test_argmax(native: NativeKernels, dtype: torch.dtype, rows: int, width: int) -> None:
    x = (torch.randn(rows, width) * 4).to(dtype)
    assert native.argmax(x).tolist() == x.float().argmax(-1).tolist()
    # Equals: the first one. A strided row. Minus infinity alone.
    coarse = torch.randint(-2, 3, (rows, width + 3)).to(dtype)[:, :width]
    assert native.argmax(coarse).tolist() == coarse.float().argmax(-1).tolist()
    assert native.argmax(torch.full((rows, width), -torch.inf).to(dtype)).tolist() == [0] * rows
    for place in {0, width // 2, width - 1}:
        x[:, place] = torch.nan
        assert native.argmax(x).tolist() == x.float().argmax(-1).tolist()
