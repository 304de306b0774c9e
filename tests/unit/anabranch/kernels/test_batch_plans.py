"""Plans are made once for each batch in flight, and never outgrow their number."""

from __future__ import annotations

import pytest
import torch

from anabranch.kernels.batch_plans import MAX_PLANS, BatchPlans
from anabranch.step.batch import ForwardBatch
from anabranch.step.plan import SequencePlan, StepPlan

pytestmark = pytest.mark.unit


def make_batch() -> ForwardBatch:
    sequence = SequencePlan(request_id="r", epoch=0, token_ids=(1,), start=0, block_ids=(0,))
    return ForwardBatch.from_plan(StepPlan(step=0, sequences=(sequence,)), 4, torch.device("cpu"))


def test_two_batches_in_turns_are_planned_once_each() -> None:
    plans = BatchPlans[int]()
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    batches = [make_batch(), make_batch()]
    seen = [plans.get(batch, ("window", None), make) for _ in range(5) for batch in batches]
    assert seen == [0, 1] * 5
    assert plans.get(batches[0], ("window", 8), make) == 2


def test_the_oldest_plan_makes_room() -> None:
    plans = BatchPlans[int]()
    batches = [make_batch() for _ in range(MAX_PLANS + 1)]
    for number, batch in enumerate(batches):
        assert plans.get(batch, (), lambda number=number: number) == number  # type: ignore[misc]
    assert plans.get(batches[-1], (), lambda: -1) == MAX_PLANS
    assert plans.get(batches[0], (), lambda: -1) == -1
