"""The compute thread: what waits is merged, everything is answered once, and nothing is dropped that is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from anabranch.errors import AnabranchError, DeadlineExceeded, WorkerDied
from anabranch.kernels.plain import PlainKernels
from anabranch.kernels.row_exact import RowExact
from anabranch.model.expert_table import ExpertTable
from benchmarks.m2n_ends import make_call
from ffn_nodes.experts import NodeExperts
from ffn_nodes.product import Product
from ffn_nodes.serving import Serving
from tests.support.ffn_calls import MemoryListener
from tests.support.in_process import wait_until
from tests.support.waiting import WAIT_S
from transport.m2n.messages import Status

pytestmark = pytest.mark.unit

ALL = {0: list(range(6)), 1: [0], 2: list(range(6))}


class Gated(PlainKernels):
    """Computes when it may."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()
        self.error: Exception | None = None

    def linear_silu_mul(
        self, x_TC: torch.Tensor, gate_up_FC: torch.Tensor, bias_F: torch.Tensor | None
    ) -> torch.Tensor:
        self.reached.set()
        assert self.gate.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        return super().linear_silu_mul(x_TC, gate_up_FC, bias_F)


class Setup:
    def __init__(self, table: ExpertTable, kernels: Gated, num_links: int, merge_wait_s: float) -> None:
        self.table, self.kernels = table, kernels
        self.failures: list[AnabranchError] = []
        self.listener = MemoryListener(num_links)
        self.serving = Serving(
            self.listener, NodeExperts(table), num_threads=1, merge_wait_s=merge_wait_s, on_failure=self.failures.append
        )
        self.serving.start()


@pytest.fixture
def start(make_table) -> Iterator[Callable[..., Setup]]:
    made: list[Setup] = []

    def run(num_links: int = 1, merge_wait_s: float = 0.0) -> Setup:
        kernels = Gated()
        made.append(Setup(make_table(ALL, RowExact(kernels)), kernels, num_links, merge_wait_s))
        return made[-1]

    yield run
    for setup in made:
        setup.kernels.gate.set()
        assert setup.serving.stop(WAIT_S)
        assert setup.serving.stop(WAIT_S)
        assert setup.listener.closed


def rows(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, 48, generator=torch.Generator().manual_seed(seed))


def test_what_came_during_a_product_is_merged_by_layer_and_taken_in_turn(start: Callable[..., Setup]) -> None:
    setup = start(num_links=3)
    setup.kernels.gate.clear()
    setup.kernels.reached.clear()
    setup.listener.bring(make_call(rows(2), layer=1, ticket=0))
    assert setup.kernels.reached.wait(WAIT_S)
    experts_TS = torch.tensor([[0, 4, 1]])
    setup.listener.bring(make_call(rows(1, 1), layer=2, ticket=1, experts_TS=experts_TS), sender=1)
    setup.listener.bring(make_call(rows(4, 2), layer=1, ticket=2), sender=1)
    setup.listener.bring(make_call(rows(1, 3), layer=2, ticket=3, experts_TS=experts_TS), sender=2)
    assert setup.serving.num_computing == 1
    assert setup.serving.num_links == 3
    assert setup.serving.activity.age_s > 0
    setup.kernels.gate.set()
    answers = setup.listener.await_answers(0, 1, 2, 3)
    assert [answer.merged_rows for answer in answers] == [2, 2, 4, 2]
    assert setup.listener.order == [0, 1, 3, 2]
    assert [answer.status for answer in answers] == [Status.OK] * 4
    assert all(answer.queue_us > 0 and answer.compute_us > 0 for answer in answers[1:])
    expected = setup.table.compute_rows(1, rows(4, 2))
    assert torch.equal(answers[2].rows_RC, expected)
    wait_until(lambda: setup.serving.activity.num_done == 3, "the last product to end")
    assert (setup.serving.num_computing, setup.serving.num_waiting) == (0, 0)


def test_a_timed_wait_merges_and_ends(start: Callable[..., Setup]) -> None:
    setup = start(num_links=2, merge_wait_s=600.0)
    setup.listener.bring(make_call(rows(1), layer=1, ticket=0), sender=0)
    wait_until(lambda: setup.serving.num_waiting == 1, "the call to wait")
    setup.listener.bring(make_call(rows(2), layer=1, ticket=1), sender=1)
    assert [answer.merged_rows for answer in setup.listener.await_answers(0, 1)] == [3, 3]
    short = start(num_links=2, merge_wait_s=0.01)
    short.listener.bring(make_call(rows(1), layer=1, ticket=0), sender=0)
    [answer] = short.listener.await_answers(0)
    assert answer.queue_us >= 10_000


def test_experts_that_are_in_excess_go_once_no_call_needs_them(start: Callable[..., Setup]) -> None:
    setup = start()
    setup.kernels.gate.clear()
    setup.kernels.reached.clear()
    setup.listener.bring(make_call(rows(1), layer=1, ticket=0))
    assert setup.kernels.reached.wait(WAIT_S)
    setup.listener.bring(make_call(rows(1), layer=0, ticket=1, experts_TS=torch.tensor([[3, 5, 0]])))
    # In a product, the thread hears nothing.
    with pytest.raises(DeadlineExceeded, match="did not listen"):
        setup.serving.set_excess(frozenset({(2, 1)}), 0.01)
    setup.kernels.gate.set()
    setup.serving.set_excess(frozenset({(0, 3), (2, 0)}), WAIT_S)
    # What was said before does not hold any more.
    assert [answer.status for answer in setup.listener.await_answers(0, 1)] == [Status.OK, Status.OK]
    wait_until(lambda: not setup.table.holds(0, [3]) and not setup.table.holds(2, [0]), "the excess to be dropped")
    setup.listener.bring(make_call(rows(1), layer=0, ticket=2, experts_TS=torch.tensor([[3, 5, 0]])))
    assert setup.listener.await_answers(2)[0].status is Status.NOT_HELD


def test_products_that_all_fail_fail_the_worker_and_one_that_does_not(start: Callable[..., Setup]) -> None:
    setup = start()
    setup.kernels.error = ZeroDivisionError("no")
    for ticket in range(15):
        setup.listener.bring(make_call(rows(1), layer=1, ticket=ticket))
        assert setup.listener.await_answers(ticket)[0].status is Status.FAILED
    setup.kernels.error = None
    setup.listener.bring(make_call(rows(1), layer=1, ticket=15))
    assert setup.listener.await_answers(15)[0].status is Status.OK
    setup.kernels.error = ZeroDivisionError("no")
    for ticket in range(16, 32):
        assert not setup.failures
        setup.listener.bring(make_call(rows(1), layer=1, ticket=ticket))
        setup.listener.await_answers(ticket)
    [error] = setup.failures
    assert isinstance(error, WorkerDied)
    assert str(error) == "every product fails, at last with ZeroDivisionError: no"


def test_a_fault_of_the_thread_itself_fails_the_worker(start: Callable[..., Setup], monkeypatch) -> None:
    setup = start()

    def compute(self: Product, calls: object) -> None:
        raise ZeroDivisionError("no")

    monkeypatch.setattr(Product, "compute", compute)
    setup.listener.bring(make_call(rows(1), layer=1, ticket=0))
    wait_until(lambda: setup.listener.closed, "the listener to close")
    [error] = setup.failures
    assert "the compute thread cannot go on: ZeroDivisionError: no" in str(error)
