"""How many rows each expert has computed."""

from __future__ import annotations

import threading

import torch

from anabranch.model.config import ModelConfig
from anabranch.model.size import num_experts

Counts = tuple[tuple[int, ...], ...]


class RowCounts:
    """Of sparse layers, since they were last taken. One thread adds, any takes."""

    def __init__(self, config: ModelConfig) -> None:
        self._sizes = [
            num_experts(config, layer) if config.is_sparse(layer) else 0 for layer in range(config.num_layers)
        ]
        self._counts = self._none()
        self._any = False
        self._lock = threading.Lock()

    def add(self, layer: int, experts_A: torch.Tensor) -> None:
        """Count a product's assignments, int32 on the CPU."""
        counts = torch.bincount(experts_A, minlength=self._sizes[layer])
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
