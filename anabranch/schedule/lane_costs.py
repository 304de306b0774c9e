"""How many lanes a batch is best dealt to, by what its parts were measured to take.

With m lanes of b / m rows each, a step of all b rows takes at least

    max(m A(b/m), m F(b/m), A(b/m) + F(b/m) + W)

A: attention halves, embedding, head and sampling of a lane's step; F: its FFN products; W: the ways there and back.
More lanes hide F and W behind A, or A behind F, and read every weight more often.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from anabranch.bounds import Seconds

MAX_LANES = 4
# Another number of lanes has to be so much better: it costs one step in which nothing is beside anything.
HYSTERESIS = 0.08
# Of what was known, after another measurement.
_KEPT = 0.98
# A prior: half of the time does not depend on the rows. It weighs as much as one measurement.
_FIXED_SHARE = 0.5

Slope = Annotated[float, Meta(ge=0.0, le=1e9)]


class LinearCost(msgspec.Struct, frozen=True, kw_only=True):
    """`fixed_s + row_s * rows`."""

    fixed_s: Seconds = 0.0
    row_s: Slope = 0.0

    def at(self, rows: float) -> float:
        return self.fixed_s + self.row_s * rows


class LaneCosts(msgspec.Struct, frozen=True, kw_only=True):
    """What a lane's step takes, by its rows.

    Attributes:
        attention, ffn: A and F.
        way_s: W.
    """

    attention: LinearCost
    ffn: LinearCost
    way_s: Seconds

    def step_s(self, rows: int, lanes: int) -> float:
        """A step of all rows."""
        part = rows / lanes
        attention_s, ffn_s = self.attention.at(part), self.ffn.at(part)
        return max(lanes * attention_s, lanes * ffn_s, attention_s + ffn_s + self.way_s)

    def best(self, rows: int, current: int) -> int:
        """The number of lanes for so many rows, given the present one; never more than rows."""
        choices = range(1, max(1, min(rows, MAX_LANES)) + 1)
        best = min(choices, key=lambda lanes: self.step_s(rows, lanes))
        if current in choices and self.step_s(rows, best) > (1 - HYSTERESIS) * self.step_s(rows, current):
            return current
        return best


class CostFit:
    """Fits a `LinearCost` to measurements, of which older ones count less and less."""

    def __init__(self) -> None:
        self._weight = self._rows = self._taken = self._rows_rows = self._rows_taken = 0.0

    def add(self, rows: int, taken_s: float) -> None:
        self._weight = _KEPT * self._weight + 1.0
        self._rows = _KEPT * self._rows + rows
        self._taken = _KEPT * self._taken + taken_s
        self._rows_rows = _KEPT * self._rows_rows + rows * rows
        self._rows_taken = _KEPT * self._rows_taken + rows * taken_s

    def cost(self) -> LinearCost:
        """What fits best, with the prior; nothing is negative."""
        if not self._weight:
            return LinearCost()
        rows, taken_s = self._rows / self._weight, self._taken / self._weight
        spread = self._rows_rows - self._weight * rows * rows
        slope = self._rows_taken - self._weight * rows * taken_s
        prior = (1 - _FIXED_SHARE) * taken_s / max(rows, 1.0)
        # As if one measurement had been made at twice the rows, and one at none, of what the prior says.
        strength = rows * rows + 1e-9
        row_s = (slope + strength * prior) / (max(spread, 0.0) + strength)
        row_s = min(max(row_s, 0.0), taken_s / max(rows, 1.0))
        return LinearCost(fixed_s=max(0.0, taken_s - row_s * rows), row_s=row_s)
