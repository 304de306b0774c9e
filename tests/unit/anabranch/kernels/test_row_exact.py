"""A row's bits do not depend on its company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.kernels.base import Kernels
from anabranch.kernels.native import select_kernels
from anabranch.kernels.plain import PlainKernels
from anabranch.kernels.row_exact import NUM_ROWS, RowExact

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
WIDTHS = [(48, 40), (33, 17), (96, 130)]


@pytest.fixture(params=["plain", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    torch.set_num_threads(1)
    if request.param == "plain":
        return PlainKernels()
    found = select_kernels(CPU, torch.float32)
    if found.name != "native":
        pytest.skip("no compiled kernels here")
    return found


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_answers_are_those_of_the_products_within_rounding(
    kernels: Kernels, dtype: torch.dtype, widths: tuple[int, int], bias: bool
) -> None:
    channels, features = widths
    x_TC = draw(37, channels, seed=0, dtype=dtype)
    weight = draw(2 * features, channels, seed=1, dtype=dtype)
    bias_F = draw(2 * features, seed=2, dtype=dtype) if bias else None
    exact = RowExact(kernels)
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.5}
    for name in ("linear", "linear_silu_mul"):
        expected = getattr(PlainKernels(), name)(x_TC, weight, bias_F)
        torch.testing.assert_close(getattr(exact, name)(x_TC, weight, bias_F), expected, **tolerance)
    assert exact.linear(x_TC[:0], weight, bias_F).shape == (0, 2 * features)


@settings(max_examples=40, deadline=None)
@given(
    num_others=st.integers(1, 300),
    place=st.floats(0, 1),
    widths=st.sampled_from(WIDTHS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    native=st.booleans(),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_a_row_alone_has_the_bits_that_it_has_among_others(
    num_others: int, place: float, widths: tuple[int, int], dtype: torch.dtype, native: bool, scale: float
) -> None:
    channels, features = widths
    exact = RowExact(select_kernels(CPU, dtype, native))
    row_1C = draw(1, channels, seed=num_others, dtype=dtype)
    others_TC = draw(num_others, channels, seed=3, dtype=dtype) * scale
    at = round(place * num_others)
    merged_TC = torch.cat((others_TC[:at], row_1C, others_TC[at:]))
    weight = draw(2 * features, channels, seed=4, dtype=dtype)
    for product in (exact.linear, exact.linear_silu_mul):
        alone = product(row_1C, weight, None)
        # Weights that lie elsewhere, too.
        assert torch.equal(product(merged_TC, weight.clone(), None)[at : at + 1], alone)


def test_without_blocks_a_row_has_other_bits_among_others(kernels: Kernels) -> None:
    """That the property is there to be had, and not of itself: a test of the test."""
    x_TC, weight = draw(300, 576, seed=5), draw(64, 576, seed=6)
    whole = kernels.linear(x_TC, weight, None)
    alone = torch.cat([kernels.linear(row_1C, weight, None) for row_1C in x_TC.split(1)])
    if torch.equal(whole, alone):
        pytest.skip("this machine's library adds up alike for any number of rows")
    exact = RowExact(kernels)
    assert torch.equal(exact.linear(x_TC, weight, None)[:NUM_ROWS], exact.linear(x_TC[:NUM_ROWS], weight, None))
