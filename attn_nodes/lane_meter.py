"""What lanes' steps take: measured on the first rank of a node that chooses its number of lanes by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from anabranch.schedule.lane_costs import CostFit, LaneCosts

# How often it is said what steps take.
MEASURED_STEPS = 16


class LaneMeter:
    """Fits costs to steps as they end.

    Args:
        measured: told every MEASURED_STEPS steps what they take.
    """

    def __init__(self, measured: Callable[[LaneCosts], None]) -> None:
        self._measured = measured
        self._attention, self._ffn, self._way = CostFit(), CostFit(), CostFit()
        self._num_steps = 0

    def ended(self, rows: int, *, attention_s: float, ffn_s: float, ways_s: Sequence[float]) -> None:
        """A step has ended.

        Args:
            attention_s, ffn_s: of all its layers.
            ways_s: what each layer's rows took on their way; more where the answer came while another lane was
                computed.
        """
        self._attention.add(rows, attention_s)
        self._ffn.add(rows, ffn_s)
        self._way.add(rows, min(ways_s, default=0.0) * len(ways_s))
        self._num_steps += 1
        if self._num_steps % MEASURED_STEPS == 0:
            way_s = self._way.cost().at(rows)
            self._measured(LaneCosts(attention=self._attention.cost(), ffn=self._ffn.cost(), way_s=way_s))
