"""How many rows each expert has computed."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

Counts = tuple[tuple[int, ...], ...]


class RowCounts:
    """Of sparse layers, since they were last taken. One thread adds, any takes.

    Args:
        layers: what can be placed: see `ffn_layers`.
    """

    def __init__(self, layers: Sequence[tuple[int, int]]) -> None:
        self._sizes = [count if count > 1 else 0 for count, _ in layers]
        self._counts = self._none()
        self._any = False
        self._lock = threading.Lock()

    def add(self, layer: int, experts_A: torch.Tensor) -> None:
        """Count a product's assignments, int32 on the CPU; not those of a shared expert, which has all rows."""
        size = self._sizes[layer]
        counts = torch.bincount(experts_A, minlength=size)[:size]
        with self._lock:
            self._counts[layer] += counts
            self._any = True

    def take(self) -> Counts | None:
        """For each layer, each expert's rows since the last time; None: there were none."""
        with self._lock:
            if not self._any:
                return None
            taken, self._counts, self._any = self._counts, self._none(), False
        return tuple(tuple(counts.tolist()) for counts in taken)

    def _none(self) -> list[torch.Tensor]:
        return [torch.zeros(size, dtype=torch.int64) for size in self._sizes]
