"""Reads single experts out of a checkpoint, in whatever form it stores them.

Shape suffixes: C hidden, F features of an expert that this rank holds.
"""

from __future__ import annotations

import torch

from anabranch.model.expert_names import expert_names
from anabranch.model.loader import WeightLoader
from anabranch.parallel.group import Group
from anabranch.parallel.split import split_range


class ExpertReader:
    """Reads this rank's slices of a sparse layer's experts.

    Args:
        group: ranks that each expert's features are sliced over.

    Attributes:
        num_features: features of an expert that this rank holds.
    """

    def __init__(self, loader: WeightLoader, group: Group, layer: int) -> None:
        moe = loader.config.moe
        assert moe is not None
        self._loader = loader
        self._names = expert_names(loader, layer)
        self._num_experts = moe.num_experts
        self._features = moe.expert_intermediate
        self._held = split_range(moe.expert_intermediate, group.size, group.rank)
        self.num_features = len(self._held)

    def fill(self, expert: int, gate_up_FC: torch.Tensor, down_CF: torch.Tensor) -> None:
        """Copy one expert.

        Args:
            gate_up_FC: `[2F, C]`: rows of the gate, then of its partners.
            down_CF: `[C, F]`.

        Raises:
            CheckpointError: see `WeightLoader.fill`.
        """
        fill, names, held = self._loader.fill, self._names, self._held
        features, hidden, every = self._features, self._loader.config.hidden_size, slice(None)
        gate_FC, up_FC = gate_up_FC[: len(held)], gate_up_FC[len(held) :]
        rows = slice(held.start, held.stop)
        if names.fused:
            one = slice(expert, expert + 1)
            gate_up_shape = (self._num_experts, 2 * features, hidden)
            up_rows = slice(features + held.start, features + held.stop)
            fill(gate_FC.unsqueeze(0), names.gate_proj, gate_up_shape, (one, rows, every))
            fill(up_FC.unsqueeze(0), names.up_proj, gate_up_shape, (one, up_rows, every))
            fill(down_CF.unsqueeze(0), names.down_proj, (self._num_experts, hidden, features), (one, every, rows))
        else:
            fill(gate_FC, names.gate_proj.format(expert), (features, hidden), (rows, every))
            fill(up_FC, names.up_proj.format(expert), (features, hidden), (rows, every))
            fill(down_CF, names.down_proj.format(expert), (hidden, features), (every, rows))
