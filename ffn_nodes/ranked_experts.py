"""The experts of a worker with several ranks, each of which holds a slice of every one.

    load -> each rank reads its slices -> all have said Loaded -> usable
    compute -> the product goes to the other ranks, this one takes part in it; the sum is the answer

An expert is used only once all ranks have it. A product that fails on one rank is torn for all: the ranks live and die
together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial

import torch

from anabranch.errors import DeadlineExceeded
from anabranch.model.expert_table import ExpertTable
from anabranch.protocol.wire_error import WireError
from anabranch.system.clock import wait_for
from ffn_nodes.commands import AnyCommand, Compute, Drop, Load, Loaded
from ffn_nodes.experts import Experts, NodeExperts
from ffn_nodes.rank import bytes_of
from runtime.rank_group import RankGroup

# `ffn_load_timeout_s`: a rank that lives and loads for longer than this does not come to an end.
LOAD_TIMEOUT_S = 600.0
# Of one command's rows; the channel takes twice as much.
MAX_ROWS_BYTES = 32 << 20


class RankedExperts(NodeExperts):
    """See `NodeExperts`.

    Args:
        table: this rank's slices.
        group: the other ranks; `heard` takes their events.
    """

    def __init__(self, table: ExpertTable, group: RankGroup[AnyCommand, Loaded]) -> None:
        super().__init__(table)
        self._group = group
        self._number = 0
        # What some ranks may have and others not.
        self._partial: Experts = frozenset()
        self._changed = threading.Condition()
        self._heard: dict[int, WireError | None] = {}

    def heard(self, rank: int, event: Loaded) -> None:
        """A rank has loaded; from any thread."""
        with self._changed:
            if event.number == self._number:
                self._heard[rank] = event.error
                self._changed.notify_all()

    def holds(self, layer: int, experts: Iterable[int]) -> bool:
        wanted = tuple(experts)
        return super().holds(layer, wanted) and self._partial.isdisjoint((layer, expert) for expert in wanted)

    def usable(self) -> Experts:
        return super().present() - self._partial

    def present(self) -> Experts:
        return super().present() | self._partial

    def load(self, missing: Experts, interrupted: Callable[[], bool]) -> bool:
        """See `NodeExperts.load`. Raises DeadlineExceeded where a rank takes too long, and what one has raised."""
        if not missing:
            return True
        with self._changed:
            self._number += 1
            self._heard.clear()
        self._partial |= missing
        self._group.send(Load(number=self._number, experts=tuple(sorted(missing))))
        if not super().load(missing, interrupted):
            return False
        with self._changed:
            wait_for(self._changed, lambda: len(self._heard) == self._group.size - 1, LOAD_TIMEOUT_S)
            absent = sorted(set(range(1, self._group.size)) - self._heard.keys())
            errors = [error for error in self._heard.values() if error is not None]
        if absent:
            raise DeadlineExceeded(f"ffn_load_timeout_s: ranks {absent} have not loaded in {LOAD_TIMEOUT_S:g} s")
        if errors:
            raise errors[0].to_error()
        self._partial -= missing
        return True

    def drop(self, excess: Experts) -> None:
        self._group.send(Drop(experts=tuple(sorted(excess))))
        super().drop(excess)
        self._partial -= excess

    def compute_rows(self, layer: int, rows_TC: torch.Tensor) -> torch.Tensor:
        none = rows_TC.new_empty(0, dtype=torch.int32)
        parts = [
            self._together(layer, part_TC, none, none, partial(self.table.compute_rows, layer, part_TC))
            for part_TC in self._parts(rows_TC)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def compute_slots(
        self, layer: int, rows_TC: torch.Tensor, rows_A: torch.Tensor, experts_A: torch.Tensor
    ) -> torch.Tensor:
        answers_AC = rows_TC.new_empty((rows_A.numel(), rows_TC.shape[1]))
        first = 0
        for part_TC in self._parts(rows_TC):
            stop = first + part_TC.shape[0]
            of_part = ((rows_A >= first) & (rows_A < stop)).nonzero().squeeze(1)
            given = part_TC, rows_A[of_part] - first, experts_A[of_part]
            compute = partial(self.table.compute_slots, layer, *given)
            answers_AC[of_part] = self._together(layer, *given, compute)
            first = stop
        return answers_AC

    def _together(
        self,
        layer: int,
        rows_TC: torch.Tensor,
        rows_A: torch.Tensor,
        experts_A: torch.Tensor,
        compute: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """This rank's part of a product that all ranks compute."""
        self._group.send(
            Compute(
                layer=layer,
                rows=bytes_of(rows_TC),
                rows_A=bytes_of(rows_A.int()),
                experts_A=bytes_of(experts_A.int()),
            )
        )
        try:
            return compute()
        except Exception as error:
            raise self._group.broken(error) from error

    def _parts(self, rows_TC: torch.Tensor) -> list[torch.Tensor]:
        """The rows in parts that commands can hold."""
        size = max(1, MAX_ROWS_BYTES // (rows_TC.shape[1] * rows_TC.element_size()))
        return [rows_TC[start : start + size] for start in range(0, max(1, rows_TC.shape[0]), size)]
