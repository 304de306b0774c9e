"""What of a ticket's rows goes to one FFN node, and the ticket itself.

Shape suffixes: T rows of a ticket, S chosen experts of a row, A assignments (a row and one of its experts), R rows of
a part, C hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from anabranch.kernels.combine import combine_slots
from anabranch.model.ffn_half import FfnInput
from anabranch.request.ffn_times import FfnTimes
from transport.m2n.messages import Answer, Combine


class Ticket:
    """Rows of one layer that are out; it keeps them until all are answered.

    Args:
        rows: may have none.
        began_s: `awake_s()` at which they went out.
        deadline_s: `awake_s()` at which rows that no node has answered are given up.

    Attributes:
        num_open: parts that are not answered.
        error: why it will not be answered.
        times: what it cost, once it is answered.
    """

    def __init__(
        self, *, step: int, lane: int, layer: int, rows: FfnInput, combine: Combine, began_s: float, deadline_s: float
    ) -> None:
        self.step = step
        self.lane = lane
        self.layer = layer
        self.rows = rows
        self.combine = combine
        self.deadline_s = deadline_s
        self.times = FfnTimes()
        self.num_open = 0
        self._began_s = began_s
        self.error: Exception | None = None
        hidden = rows.normed_TC.shape[1]
        # An answer for each choice; one for each row is a dense layer's, whose rows are one part.
        count = rows.experts_TS.numel() if rows.experts_TS is not None and combine is Combine.SLOTS else 0
        self._answers_AC = rows.normed_TC.new_empty((count, hidden))
        # Sums are kept part by part, and added in the parts' order.
        self._sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def num_rows(self) -> int:
        return self.rows.normed_TC.shape[0]

    @property
    def done(self) -> bool:
        """Whether `result` can be had, or raises."""
        return self.num_open == 0 or self.error is not None

    def take(self, part: Part, answer: Answer, now_s: float) -> None:
        """A part's answer, which is copied, and what it cost.

        Args:
            now_s: `awake_s()`.
        """
        self.num_open -= 1
        rows_RC = answer.rows_RC
        queue_s, compute_s = answer.queue_us / 1e6, answer.compute_us / 1e6
        self.times = FfnTimes(
            queue_s=queue_s,
            compute_s=compute_s,
            way_s=max(0.0, now_s - self._began_s - queue_s - compute_s),
            num_answers=self.times.num_answers + 1,
            merged_rows=self.times.merged_rows + answer.merged_rows,
        )
        device = self.rows.normed_TC.device
        if part.picked_A is None or part.picked_R is None:
            self._answers_AC = rows_RC.to(device, copy=True)
        elif self.combine is Combine.SUMS:
            self._sums[part.number] = (part.picked_R.to(device), rows_RC.to(device, copy=True))
        else:
            self._answers_AC.index_copy_(0, part.picked_A.to(device), rows_RC.to(device))

    def result(self) -> torch.Tensor:
        """`[T, C]` in the model's dtype: what the layer's FFN half answers. Raises `error`."""
        if self.error is not None:
            raise self.error
        normed_TC, weights_TS, experts_TS, shared = self.rows
        if experts_TS is None:
            return self._answers_AC
        if self.combine is Combine.SUMS:
            total_TC = torch.zeros(normed_TC.shape, dtype=torch.float32, device=normed_TC.device)
            for number in sorted(self._sums):
                total_TC.index_add_(0, *self._sums[number])
            return total_TC.to(normed_TC.dtype)
        assert weights_TS is not None
        answers_TSC = self._answers_AC.view(*experts_TS.shape, normed_TC.shape[1])
        return combine_slots(answers_TSC, weights_TS, shared=shared)


@dataclass(eq=False, slots=True, kw_only=True)
class Part:
    """The assignments of a ticket that go to one node, in the ticket's order.

    Attributes:
        number: of the ticket's parts, ascending.
        experts: of these assignments, each once.
        picked_A: int64, places among the ticket's assignments (`T x S`, row by row); None: a dense layer, all rows.
        picked_R: int64, the rows that these need, ascending; None: all rows.
        rows_A: int32, each assignment's place in `picked_R`.
        num_rows: those that these need.
        attempt: how often it was sent before.
        tried: nodes that refused or lost it.
        reason: what the last of these said.
        refused: whether one of them could not compute it.
        sent_to: nodes that it is out at.
        open: whether it is not answered.
    """

    ticket: Ticket
    number: int
    experts: tuple[int, ...]
    picked_A: torch.Tensor | None
    picked_R: torch.Tensor | None
    rows_A: torch.Tensor
    num_rows: int
    attempt: int = 0
    tried: set[str] = field(default_factory=set)
    reason: str = ""
    refused: bool = False
    sent_to: set[str] = field(default_factory=set)
    open: bool = True
