"""Merged calls are answered as each alone would be, bit for bit, and what is wrong is refused by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from anabranch.errors import OutOfBlocks
from anabranch.kernels.combine import sum_assignments
from anabranch.kernels.native import select_kernels
from anabranch.kernels.plain import PlainKernels
from anabranch.kernels.row_exact import RowExact
from benchmarks.m2n_ends import make_call
from ffn_nodes.experts import NodeExperts
from ffn_nodes.product import Product
from transport.m2n.messages import Call, Combine, Status

pytestmark = pytest.mark.unit

HIDDEN, NUM_EXPERTS, TOP_K = 48, 6, 3
ALL = {0: list(range(6)), 1: [0], 2: list(range(6))}


def no_failure(error: Exception) -> None:
    raise error


def draw_rows(num_rows: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(seed))


def draw_call(combine: Combine, num_rows: int, seed: int, layer: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    rows_TC = draw_rows(num_rows, seed)
    if combine is Combine.ROWS:
        return make_call(rows_TC, layer=1, ticket=seed)
    experts_TS = torch.rand(num_rows, NUM_EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    weights_TS = torch.rand(experts_TS.shape, generator=generator) if combine is Combine.SUMS else None
    return make_call(rows_TC, layer=layer, ticket=seed, experts_TS=experts_TS, weights_TS=weights_TS)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    combine=st.sampled_from([Combine.ROWS, Combine.SLOTS]),
    native=st.booleans(),
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=6),
)
def test_a_call_has_the_same_answer_alone_merged_and_of_another_table(
    data: st.DataObject, combine: Combine, native: bool, sizes: list[int], make_table
) -> None:
    kernels = select_kernels(torch.device("cpu"), torch.float32, native)
    table = make_table(ALL, RowExact(kernels))
    calls = [
        draw_call(
            data.draw(st.sampled_from([Combine.SLOTS, Combine.SUMS])) if combine is Combine.SLOTS else combine, size, i
        )
        for i, size in enumerate(sizes)
    ]
    merged = Product(NodeExperts(table), no_failure).compute(calls)
    for call, (status, rows_RC) in zip(calls, merged, strict=True):
        assert status is Status.OK
        needed = sorted(set(call.experts_A.tolist())) or [0]
        other = make_table({call.layer: needed}, RowExact(kernels))
        [(alone_status, alone_RC)] = Product(NodeExperts(other), no_failure).compute([call])
        assert alone_status is Status.OK
        assert torch.equal(rows_RC, alone_RC)
        expected_rows = call.experts_A.numel() if call.combine is Combine.SLOTS else call.rows_TC.shape[0]
        assert rows_RC.shape == (expected_rows, HIDDEN)
        assert rows_RC.dtype is torch.float32


def test_sums_are_those_of_the_slots(make_table) -> None:
    product = Product(NodeExperts(make_table(ALL)), no_failure)
    call = draw_call(Combine.SUMS, 9, 1)
    slots = replace(call, combine=Combine.SLOTS, weights_A=torch.empty(0))
    (_, slots_AC), (_, sums_TC) = product.compute([slots, call])
    assert torch.equal(sums_TC, sum_assignments(slots_AC, call.weights_A, call.rows_A, 9))


def test_a_call_that_is_wrong_is_refused_and_those_beside_it_are_not(make_table) -> None:
    product = Product(NodeExperts(make_table({**ALL, 0: [0, 1, 2]})), no_failure)
    ints = {"dtype": torch.int32}
    held = make_call(draw_rows(2, 0), experts_TS=torch.tensor([[0, 1], [2, 0]]))
    nan = draw_rows(2, 0).index_fill(0, torch.tensor([1]), torch.nan)
    wrong: list[tuple[Call, Status]] = [
        (replace(held, experts_A=torch.tensor([0, 3, 2, 0], **ints)), Status.NOT_HELD),
        (replace(held, experts_A=torch.tensor([0, 6, 2, 0], **ints)), Status.MALFORMED),
        (replace(held, experts_A=torch.tensor([0, -1, 2, 0], **ints)), Status.MALFORMED),
        (replace(held, rows_A=torch.tensor([0, 0, 2, 1], **ints)), Status.MALFORMED),
        (replace(held, rows_A=torch.tensor([0, -1, 1, 1], **ints)), Status.MALFORMED),
        (replace(held, rows_A=torch.tensor([0, 0, 1], **ints)), Status.MALFORMED),
        (replace(held, combine=Combine.SUMS), Status.MALFORMED),
        (replace(held, combine=Combine.SUMS, weights_A=torch.tensor([1, 1, 1, torch.inf])), Status.MALFORMED),
        (replace(held, combine=Combine.ROWS), Status.MALFORMED),
        (replace(held, rows_TC=nan), Status.MALFORMED),
        (replace(held, rows_TC=draw_rows(2, 0) / 0), Status.MALFORMED),
    ]
    made = product.compute([held, *(call for call, _ in wrong), held])
    assert [status for status, _ in made] == [Status.OK, *(status for _, status in wrong), Status.OK]
    assert all(rows_RC.shape == (0, HIDDEN) for _, rows_RC in made[1:-1])
    assert torch.equal(made[0][1], made[-1][1])
    assert product.compute([replace(held, layer=3)])[0][0] is Status.MALFORMED
    assert product.compute([replace(held, layer=1)])[0][0] is Status.MALFORMED
    assert product.compute([make_call(draw_rows(1, 0), layer=0)])[0][0] is Status.MALFORMED
    large = make_call(torch.full((1, HIDDEN), 3e38), layer=1)
    assert product.compute([large])[0][0] is Status.OK
    other = Product(NodeExperts(make_table({})), no_failure)
    assert other.compute([make_call(draw_rows(1, 0), layer=1)])[0][0] is Status.NOT_HELD
    assert not other.compute([])


class Failing(PlainKernels):
    """Fails where a row begins with 13."""

    def linear_silu_mul(
        self, x_TC: torch.Tensor, gate_up_FC: torch.Tensor, bias_F: torch.Tensor | None
    ) -> torch.Tensor:
        if (x_TC[:, 0] == 13).any():
            raise OutOfBlocks("no room for 13")
        return super().linear_silu_mul(x_TC, gate_up_FC, bias_F)


def test_a_call_whose_product_raises_fails_alone(make_table) -> None:
    errors: list[Exception] = []
    product = Product(NodeExperts(make_table(ALL, RowExact(Failing()))), errors.append)
    good = [draw_call(Combine.SLOTS, size, size) for size in (3, 20)]
    bad = draw_call(Combine.SLOTS, 5, 5)
    bad.rows_TC[2, 0] = 13
    made = product.compute([good[0], bad, good[1]])
    assert [status for status, _ in made] == [Status.OK, Status.FAILED, Status.OK]
    assert [str(error) for error in errors] == ["no room for 13"]
    undisturbed = Product(NodeExperts(make_table(ALL)), no_failure).compute(good)
    assert torch.equal(made[0][1], undisturbed[0][1])
    assert torch.equal(made[2][1], undisturbed[1][1])
