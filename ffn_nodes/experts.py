"""What an FFN worker holds and computes with, on one rank or on several."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch

from anabranch.model.config import ModelConfig
from anabranch.model.expert_table import ExpertTable
from anabranch.protocol.ffn import Holding

logger = logging.getLogger(__name__)

Experts = frozenset[tuple[int, int]]
"""(layer, expert); a dense layer has one expert, 0."""


class NodeExperts:
    """The experts of a worker with one rank. One thread loads, another one drops and computes."""

    def __init__(self, table: ExpertTable) -> None:
        self.table = table

    @property
    def config(self) -> ModelConfig:
        return self.table.config

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """What can be placed here: `ffn_layers`."""
        return self.table.layers

    def num_experts(self, layer: int) -> int:
        """See `ExpertTable.num_experts`."""
        return self.table.num_experts(layer)

    def holds(self, layer: int, experts: Iterable[int]) -> bool:
        """Whether all of these can be computed with."""
        return self.table.holds(layer, experts)

    def usable(self) -> Experts:
        """All that can be computed with."""
        return self.present()

    def present(self) -> Experts:
        """All that takes memory."""
        return experts_of(self.table.holding())

    def load(self, missing: Experts, interrupted: Callable[[], bool]) -> bool:
        """Read experts that are not here; False where it was interrupted between two of them.

        Raises:
            CheckpointError: the checkpoint is broken, or another one than before.
        """
        return load_experts(self.table, missing, interrupted)

    def drop(self, excess: Experts) -> None:
        """Forget experts."""
        for layer, expert in excess:
            self.table.drop(layer, (expert,))

    def compute_rows(self, layer: int, rows_TC: torch.Tensor) -> torch.Tensor:
        """See `ExpertTable.compute_rows`."""
        return self.table.compute_rows(layer, rows_TC)

    def compute_slots(
        self, layer: int, rows_TC: torch.Tensor, rows_A: torch.Tensor, experts_A: torch.Tensor
    ) -> torch.Tensor:
        """See `ExpertTable.compute_slots`."""
        return self.table.compute_slots(layer, rows_TC, rows_A, experts_A)


def load_experts(table: ExpertTable, missing: Iterable[tuple[int, int]], interrupted: Callable[[], bool]) -> bool:
    """Read this rank's slices of experts, one expert after the other; False where it was interrupted."""
    wanted = sorted(missing)
    if not wanted:
        return True
    with table.reading() as loader:
        for layer, expert in wanted:
            if interrupted():
                return False
            table.load(loader, layer, (expert,))
    logger.info("loaded %d experts, %.0f MiB in all", len(wanted), table.num_bytes / 2**20)
    return True


def experts_of(holding: Holding) -> Experts:
    """The same as a set."""
    return frozenset((layer, expert) for layer, experts in enumerate(holding) for expert in experts)
