"""Steps that are being computed, lane by lane, and the blocks that wait for their end.

A lane's steps end in their order; a step of another lane may end at any time, so blocks that a step may still write
to are given back only when it has ended. With one lane that is not needed: whoever uses the blocks again comes after
that step on every rank.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from anabranch.cache.block_table import BlockTable
from anabranch.schedule.sequence import Sequence
from anabranch.step.plan import StepPlan


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A step that is being computed.

    Attributes:
        sequences: of each part of the plan.
        places: of the sequences that sample: which of the step's tokens is theirs.
        chunks: whether it computes prompts.
        held: blocks of sequences that have left meanwhile.
    """

    plan: StepPlan
    sequences: tuple[Sequence, ...]
    places: dict[Sequence, int]
    chunks: bool
    held: list[BlockTable] = field(default_factory=list)


class Flights:
    """The flights of each lane.

    Args:
        num_lanes: most lanes.
        max_ahead: most steps of a lane in flight.
    """

    def __init__(self, num_lanes: int, max_ahead: int) -> None:
        self.num_lanes = num_lanes
        self._max_ahead = max_ahead
        self._lanes: list[deque[Flight]] = [deque() for _ in range(num_lanes)]
        # Lanes, the one whose last step was planned longest ago first.
        self._order = list(range(num_lanes))

    def __bool__(self) -> bool:
        return any(self._lanes)

    def order(self) -> tuple[int, ...]:
        """Lanes in the order in which they are to be planned for."""
        return tuple(self._order)

    def last(self, lane: int) -> Flight | None:
        """The step that a lane's next one follows."""
        return self._lanes[lane][-1] if self._lanes[lane] else None

    def may_plan(self, lane: int) -> bool:
        """Whether a lane's next step can be planned behind what is in flight: not behind a prompt's chunk."""
        flights = self._lanes[lane]
        return not flights or (len(flights) < self._max_ahead and not flights[-1].chunks)

    def launch(self, flight: Flight) -> None:
        lane = flight.plan.lane
        self._lanes[lane].append(flight)
        self._order.remove(lane)
        self._order.append(lane)

    def land(self, plan: StepPlan) -> Flight:
        """Forget the oldest step of its lane, which `plan` must be."""
        flight = self._lanes[plan.lane].popleft()
        assert flight.plan is plan, f"step {plan.step} landed before step {flight.plan.step}"
        return flight

    def hold(self, sequence: Sequence, table: BlockTable) -> bool:
        """Keep the blocks of a sequence that leaves until no step uses them; False where none does."""
        if self.num_lanes == 1:
            return False
        for flights in self._lanes:
            for flight in reversed(flights):
                if sequence in flight.sequences:
                    flight.held.append(table)
                    return True
        return False
