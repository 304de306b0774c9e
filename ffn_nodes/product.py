"""One product: all calls of a layer as one batch of rows, each expert computed once, each call answered by itself.

Shape suffixes: T rows, A assignments (a row and one of its experts), R rows of an answer, C hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from anabranch.kernels.combine import sum_assignments
from ffn_nodes.experts import NodeExperts
from ffn_nodes.row_counts import RowCounts
from transport.m2n.messages import Call, Combine, Status

Made = tuple[Status, torch.Tensor]
"""A status, and the rows `[R, C]` of the answer: none unless it is OK."""


class Product:
    """Computes calls with the experts that are here. One thread calls.

    Args:
        failed: told of what a computation raised, which is answered with FAILED.

    Attributes:
        row_counts: of what was computed.
    """

    def __init__(self, experts: NodeExperts, failed: Callable[[Exception], None]) -> None:
        self.row_counts = RowCounts(experts.layers)
        self._experts = experts
        self._failed = failed

    def compute(self, calls: Sequence[Call]) -> list[Made]:
        """What each call of one layer is answered with; never raises.

        A row's bits do not depend on the calls beside it where products are row-exact.
        """
        statuses = [self._check(call) for call in calls]
        good = [call for call, status in zip(calls, statuses, strict=True) if status is Status.OK]
        made = iter(self._merged(good))
        return [(status, _none(call)) if status else next(made) for call, status in zip(calls, statuses, strict=True)]

    def _check(self, call: Call) -> Status:
        config = self._experts.config
        num_rows = call.rows_TC.shape[0]
        if call.layer >= config.num_layers or not _all_finite(call.rows_TC):
            return Status.MALFORMED
        if (call.combine is Combine.ROWS) is config.is_sparse(call.layer):
            return Status.MALFORMED
        if call.combine is Combine.ROWS:
            return Status.OK if self._experts.holds(call.layer, (0,)) else Status.NOT_HELD
        num_weights = call.experts_A.numel() if call.combine is Combine.SUMS else 0
        if call.rows_A.numel() != call.experts_A.numel() or call.weights_A.numel() != num_weights:
            return Status.MALFORMED
        chosen = set(call.experts_A.tolist())
        if not (
            _all_below(call.rows_A, num_rows) and all(0 <= e < self._experts.num_experts(call.layer) for e in chosen)
        ):
            return Status.MALFORMED
        if not _all_finite(call.weights_A):
            return Status.MALFORMED
        return Status.OK if self._experts.holds(call.layer, chosen) else Status.NOT_HELD

    def _merged(self, calls: Sequence[Call]) -> list[Made]:
        """All calls as one; where that fails, each by itself, so that none fails for another."""
        if not calls:
            return []
        try:
            return [(Status.OK, rows_RC) for rows_RC in self._rows(calls)]
        except Exception as error:
            if len(calls) > 1:
                return [made for call in calls for made in self._merged([call])]
            self._failed(error)
            return [(Status.FAILED, _none(calls[0]))]

    def _rows(self, calls: Sequence[Call]) -> list[torch.Tensor]:
        experts, layer = self._experts, calls[0].layer
        num_rows = [call.rows_TC.shape[0] for call in calls]
        rows_TC = _joined([call.rows_TC for call in calls]).to(experts.device)
        if calls[0].combine is Combine.ROWS:
            return list(experts.compute_rows(layer, rows_TC).cpu().split_with_sizes(num_rows))
        first_rows = [sum(num_rows[:place]) for place in range(len(calls))]
        rows_A = _joined([call.rows_A + first for call, first in zip(calls, first_rows, strict=True)])
        experts_A = _joined([call.experts_A for call in calls])
        answers_AC = experts.compute_slots(
            layer, rows_TC, rows_A.to(experts.device), experts_A.to(experts.device)
        ).cpu()
        self.row_counts.add(layer, experts_A)
        parts = answers_AC.split_with_sizes([call.experts_A.numel() for call in calls])
        return [
            sum_assignments(part_AC, call.weights_A, call.rows_A, call.rows_TC.shape[0])
            if call.combine is Combine.SUMS
            else part_AC
            for call, part_AC in zip(calls, parts, strict=True)
        ]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _all_finite(values: torch.Tensor) -> bool:
    """Whether no value is infinite or no number; mostly in one pass."""
    # What is not finite makes the sum so; a sum that is not may also be of large values.
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())


def _all_below(numbers_A: torch.Tensor, limit: int) -> bool:
    """Whether all are from 0 on and below `limit`."""
    if not numbers_A.numel():
        return True
    least, greatest = numbers_A.aminmax()
    return int(least) >= 0 and int(greatest) < limit


def _none(call: Call) -> torch.Tensor:
    return call.rows_TC.new_empty((0, call.rows_TC.shape[1]))
