"""The GPU's kernels on a GPU: compiled attention, and the library's, against plain attention in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from anabranch.cache.paged_kv import LayerKv
from anabranch.kernels.block_attention import plain_block
from anabranch.kernels.flex import FlexKernels, load_flex
from anabranch.kernels.plain import PlainKernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.unit,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible here"),
    pytest.mark.timeout(600),
]
plain = PlainKernels()
MakeCase = Callable[..., Any]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
BATCHES = {
    "decode": [(1, 1), (1, 17), (1, 33), (1, 700), (1, 64)],
    "decode-one-long": [(1, 5000)],
    "decode-many": [(1, 10 + 37 * b) for b in range(64)],
    "prompts": [(300, 300), (128, 1500), (5, 90)],
    "mixed": [(1, 900), (257, 400), (1, 3), (2, 50)],
}


@pytest.fixture(scope="module", params=DTYPES, ids=["float32", "bfloat16", "float16"])
def kernels(request: pytest.FixtureRequest) -> tuple[FlexKernels, torch.dtype]:
    return load_flex(torch.device("cuda"), request.param), request.param


def on_gpu(case: Any) -> Any:
    """A case with everything on the GPU; its pool keeps the stride between K and V that a real one has."""
    batch = case.batch
    moved = {name: x.cuda() for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
    k, v = torch.stack((case.kv.k, case.kv.v)).cuda()
    return type(case)(q=case.q.cuda(), kv=LayerKv(k, v), batch=replace(batch, **moved))


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.float(), want.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(9, 3, 64, 16), (32, 8, 128, 64), (6, 6, 80, 48), (8, 2, 256, 128)],
)
def test_paged_attention(
    make_case: MakeCase,
    kernels: tuple[FlexKernels, torch.dtype],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    name: str,
) -> None:
    compiled, dtype = kernels
    case = on_gpu(
        make_case(
            lens=BATCHES[name], heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype
        )
    )
    with torch.inference_mode():
        got = compiled.paged_attention(case.q, case.kv, case.batch, head_dim**-0.5, window)
        want = plain.paged_attention(case.q, case.kv, case.batch, head_dim**-0.5, window)
    close(got[0], want[0], dtype)
    close(got[1], want[1], dtype)


@pytest.mark.parametrize("head_dim", [64, 20])
def test_dense_attention(make_case: MakeCase, kernels: tuple[FlexKernels, torch.dtype], head_dim: int) -> None:
    """A ring's steps: whole blocks, and a shard whose tokens are blocks of their own."""
    compiled, dtype = kernels
    q = torch.randn(70, 6, head_dim, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 130, 2, head_dim, device="cuda", dtype=dtype)
    got, want = compiled.block_attention(q, k, v, 0.2), plain_block(q, k, v, 0.2)
    close(got[0], want[0], dtype)
    close(got[1], want[1], dtype)
    case = on_gpu(make_case(lens=[(40, 90), (7, 7)], heads=6, kv_heads=2, head_dim=head_dim, block_size=1, dtype=dtype))
    with torch.inference_mode():
        for window in (None, 9):
            got = compiled.paged_attention(case.q, case.kv, case.batch, 0.2, window)
            want = plain.paged_attention(case.q, case.kv, case.batch, 0.2, window)
            close(got[0], want[0], dtype)
            close(got[1], want[1], dtype)
