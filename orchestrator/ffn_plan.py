"""What FFN workers shall hold, worked out from how things stood at one moment; arithmetic that takes a while."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anabranch.errors import ConfigError
from anabranch.parallel.expert_placement import imbalance, place
from anabranch.protocol.ffn import Holding
from orchestrator.ffn_member import Experts, holding_of

logger = logging.getLogger(__name__)

# Where loads are measured, a worker without a limit gets at most so many times an even share of all copies. What is
# more than one copy of an expert here pays for itself, or is not made.
MEASURED_ROOM = 1.25
# Experts move for the load's sake alone where that lowers the imbalance at least to so much of it.
WORTH = 0.9


@dataclass(frozen=True, kw_only=True)
class FfnTargets:
    """What each worker shall hold.

    Attributes:
        holdings: worker -> its experts; none where not all experts fit once.
        problem: why they do not.
        measured: whether loads decided it.
    """

    holdings: Mapping[str, Holding]
    problem: str = ""
    measured: bool = False


@dataclass(frozen=True, kw_only=True)
class FfnPlan:
    """How things stand.

    Attributes:
        layers: per layer, the number of experts and the bytes of one.
        capacities: worker -> most bytes; 0: no limit.
        replicas: workers that shall hold each expert; 0: all. Fewer do where they have no more room.
        held: worker -> what it holds or is about to.
        loads: per layer and expert, rows; None: not measured.
        for_load: whether nothing but the load is a reason to move experts.
    """

    layers: Sequence[tuple[int, int]]
    capacities: Mapping[str, int]
    replicas: int
    held: Mapping[str, Experts]
    loads: Sequence[Sequence[float]] | None
    for_load: bool

    def make(self) -> FfnTargets | None:
        """None: what is held stays. Depends on nothing but this, so any thread may call it."""
        current = {name: holding_of(experts, len(self.layers)) for name, experts in self.held.items()}
        if self.loads is not None and (targets := self._measured(current, self.loads)) is not None:
            return targets if not self.for_load or self._is_worth_it(current, targets, self.loads) else None
        return None if self.for_load else self._unmeasured(current)

    def _unmeasured(self, current: Mapping[str, Holding]) -> FfnTargets:
        problem = ""
        for replicas in range(self._num_copies, 0, -1):
            try:
                return FfnTargets(holdings=place(self.layers, self.capacities, replicas=replicas, current=current))
            except ConfigError as error:
                problem = str(error)
                logger.warning(
                    "experts cannot be on %d of %d ffn workers each: %s", replicas, len(self.capacities), error
                )
        return FfnTargets(holdings={}, problem=problem)

    def _measured(self, current: Mapping[str, Holding], loads: Sequence[Sequence[float]]) -> FfnTargets | None:
        """None where there is no room to go by loads."""
        if not self._num_copies:
            return None
        whole = sum(count * num_bytes for count, num_bytes in self.layers)
        largest = max(num_bytes for _, num_bytes in self.layers)
        enough = int(MEASURED_ROOM * whole * self._num_copies / len(self.capacities)) + largest
        capacities = {name: capacity or enough for name, capacity in self.capacities.items()}
        try:
            holdings = place(self.layers, capacities, replicas=self._num_copies, current=current, loads=loads)
        except ConfigError:
            return None
        return FfnTargets(holdings=holdings, measured=True)

    @property
    def _num_copies(self) -> int:
        return min(self.replicas or len(self.capacities), len(self.capacities))

    def _is_worth_it(
        self, current: Mapping[str, Holding], targets: FfnTargets, loads: Sequence[Sequence[float]]
    ) -> bool:
        before, after = (imbalance(held.values(), loads) for held in (current, targets.holdings))
        if after > WORTH * before:
            return False
        # Old and new have to be held at the same time, or rows would wait meanwhile.
        for name, capacity in self.capacities.items():
            both = self.held[name] | {(i, e) for i, experts in enumerate(targets.holdings[name]) for e in experts}
            if capacity and sum(self.layers[layer][1] for layer, _ in both) > capacity:
                logger.info("experts stay where they are: %s has no room for both old and new ones", name)
                return False
        logger.info("experts move for an even load: from %.2f to %.2f times the mean at the busiest", before, after)
        return True
