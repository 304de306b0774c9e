"""How many rows each expert computes of late, and when that is a reason to move experts. Arithmetic only."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from anabranch.errors import MalformedMessage
from anabranch.parallel.expert_placement import imbalance
from anabranch.protocol.ffn import Holding

# Of the busiest worker's rows, in the mean's, above which experts move. `place` aims at 1.1, and what lies between
# is left alone, so that a load that is only noisy moves nothing.
TOO_UNEVEN = 1.3
# Fewer rows for each expert say nothing of it.
MIN_ROWS_PER_EXPERT = 16
# Parts of the cool-down: after which a row counts half, and between two looks.
HALF_LIFE = 0.5
LOOK = 0.1


class FfnBalance:
    """Adds up what FFN workers report, and forgets it by and by.

    A row that two workers have computed, because the first was late, counts twice; that is as much work as it was.

    Args:
        rebalance_s: shortest time between two moves; 0: loads decide nothing.
    """

    def __init__(self, rebalance_s: float) -> None:
        self._rebalance_s = rebalance_s
        self._rows: list[list[float]] = []
        self._counted_s = self._look_at_s = 0.0
        self._began = False

    def add(self, rows: Sequence[Sequence[int]], layers: Sequence[tuple[int, int]], now_s: float) -> None:
        """Take a worker's report in.

        Args:
            rows: per layer and expert, since its last one; none of a dense layer.
            layers: per layer, the number of experts and the bytes of one.
            now_s: seconds; never goes back.

        Raises:
            MalformedMessage: it is of another model.
        """
        if [len(counts) for counts in rows] != [count if count > 1 else 0 for count, _ in layers]:
            raise MalformedMessage("rows of experts that the model has not; run the same release everywhere")
        if not self._began:
            # What comes first is a few requests' load: look only after a whole cool-down.
            self._began = True
            self._rows = [[0.0] * len(counts) for counts in rows]
            self._counted_s, self._look_at_s = now_s, now_s + self._rebalance_s
        self._forget(now_s)
        for sums, counts in zip(self._rows, rows, strict=True):
            for expert, count in enumerate(counts):
                if count:
                    sums[expert] += count

    def loads(self, layers: Sequence[tuple[int, int]]) -> tuple[tuple[float, ...], ...] | None:
        """Per layer and expert, rows of late; None: too few, or loads decide nothing. A dense layer's is 1."""
        if not self._rebalance_s or not self._began:
            return None
        num_experts = sum(map(len, self._rows))
        if sum(map(sum, self._rows)) < MIN_ROWS_PER_EXPERT * num_experts:
            return None
        return tuple(tuple(sums) or (1.0,) * count for sums, (count, _) in zip(self._rows, layers, strict=True))

    def is_due(self, holdings: Collection[Holding], layers: Sequence[tuple[int, int]], now_s: float) -> bool:
        """Whether the load is so uneven that experts should move, and nothing has been moved for a while."""
        if not self._rebalance_s or not self._began or now_s < self._look_at_s:
            return False
        self._look_at_s = now_s + LOOK * self._rebalance_s
        loads = self.loads(layers)
        return loads is not None and imbalance(holdings, loads) > TOO_UNEVEN

    def moved(self, now_s: float) -> None:
        """Experts move: nothing is due before the cool-down has passed."""
        self._look_at_s = max(self._look_at_s, now_s + self._rebalance_s)

    def give_up(self) -> None:
        """Loads decide nothing from now on."""
        self._rebalance_s = 0.0

    def _forget(self, now_s: float) -> None:
        if not self._rebalance_s:
            return
        kept = 0.5 ** ((now_s - self._counted_s) / (HALF_LIFE * self._rebalance_s))
        self._counted_s = now_s
        self._rows = [[kept * count for count in sums] for sums in self._rows]
