"""Rotary angles of a step's positions. Shape suffixes: T tokens, R features of a head that are turned."""

from __future__ import annotations

import torch

from anabranch.model.config import RopeConfig


class Rotary:
    """Cosines and sines, once for each forward pass; every layer turns by the same ones."""

    def __init__(self, config: RopeConfig, device: torch.device) -> None:
        inv_freq = torch.tensor(config.inv_freq, dtype=torch.float32, device=device)
        self._inv_freq_R = torch.cat((inv_freq, inv_freq))
        self._scaling = config.attention_scaling

    def forward(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T] int64 -> (cos [T, R], sin [T, R])`, float32, both halves filled."""
        angles_TR = positions_T.float().unsqueeze(-1) * self._inv_freq_R
        cos_TR, sin_TR = angles_TR.cos(), angles_TR.sin()
        if self._scaling != 1.0:
            return cos_TR * self._scaling, sin_TR * self._scaling
        return cos_TR, sin_TR
