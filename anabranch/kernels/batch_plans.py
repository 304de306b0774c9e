"""What kernels work out once for a batch and use in each of its layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from anabranch.step.batch import ForwardBatch

Plan = TypeVar("Plan")

# Several batches may be in flight in turns, and a model's layers may differ in windows and shapes.
MAX_PLANS = 16


class BatchPlans(Generic[Plan]):
    """Plans by batch and by what else they depend on; the least recently made is dropped."""

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple[object, ...], tuple[ForwardBatch, Plan]] = OrderedDict()

    def get(self, batch: ForwardBatch, key: tuple[object, ...], make: Callable[[], Plan]) -> Plan:
        """The plan of a batch for `key`; `make` is called where there is none."""
        # The batch is held with its plan, so no other can have its id.
        whole_key = (id(batch), *key)
        known = self._plans.get(whole_key)
        if known is not None:
            return known[1]
        plan = make()
        self._plans[whole_key] = batch, plan
        while len(self._plans) > MAX_PLANS:
            self._plans.popitem(last=False)
        return plan
