"""Calls that have come and are not computed, by layer."""

from __future__ import annotations

from collections.abc import Collection

from transport.m2n.base import Arrived


class WaitingCalls:
    """Gives out all calls of a layer together, the layer first whose oldest call has waited longest.

    Args:
        merge_wait_s: how long a layer's calls wait for those of other links; 0: whatever waits is given out.
    """

    def __init__(self, merge_wait_s: float) -> None:
        self._merge_wait_s = merge_wait_s
        self._layers: dict[int, list[Arrived]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._layers.values()))

    def add(self, arrived: Arrived) -> None:
        self._layers.setdefault(arrived.call.layer, []).append(arrived)

    def take(self, now_s: float, num_links: int) -> list[Arrived]:
        """All calls of one layer, in their order; none where no layer has waited long enough.

        Args:
            now_s: `time.monotonic()`.
            num_links: where so many links wait for a layer, no other can come.
        """
        ready = [
            (calls[0].arrived_s, layer)
            for layer, calls in self._layers.items()
            if now_s - calls[0].arrived_s >= self._merge_wait_s
            or len({arrived.sender for arrived in calls}) >= num_links
        ]
        return self._layers.pop(min(ready)[1]) if ready else []

    def ready_in_s(self, now_s: float, limit_s: float) -> float:
        """Seconds until `take` gives something though nothing more comes; at most `limit_s`."""
        if not self._layers:
            return limit_s
        oldest_s = min(calls[0].arrived_s for calls in self._layers.values())
        return min(max(0.0, oldest_s + self._merge_wait_s - now_s), limit_s)

    def name_any(self, experts: Collection[tuple[int, int]]) -> bool:
        """Whether a call needs one of these (layer, expert)."""
        layers = {layer for layer, _ in experts}
        for layer in layers & self._layers.keys():
            for arrived in self._layers[layer]:
                # A dense layer's call names nothing: it has one expert, 0.
                named = arrived.call.experts_A.tolist() or (0,)
                if any((layer, expert) in experts for expert in named):
                    return True
        return False
