"""Vocabulary-parallel embedding and LM head. Shape suffixes: T tokens, S sampled rows, C hidden, V vocabulary."""

from __future__ import annotations

import torch
from torch.nn import functional

from anabranch.kernels.base import Kernels
from anabranch.model.loader import WeightLoader
from anabranch.parallel.group import Group
from anabranch.parallel.split import padded_share


def load_vocabulary(loader: WeightLoader, group: Group, name: str) -> torch.Tensor:
    """This rank's rows of a `[V, C]` tensor, zero rows at the end filling it up to an equal share."""
    config = loader.config
    share, held = padded_share(config.vocab_size, group.size, group.rank)
    weight_VC = loader.empty(share, config.hidden_size)
    whole = (config.vocab_size, config.hidden_size)
    loader.fill(weight_VC[: len(held)], name, whole, (slice(held.start, held.stop), slice(None)))
    weight_VC[len(held) :].zero_()
    return weight_VC


class Embedding:
    """Token embedding; each rank holds some of the vocabulary and adds zero for the rest."""

    def __init__(self, weight_VC: torch.Tensor, group: Group) -> None:
        self.weight_VC = weight_VC
        self._group = group
        self._start = group.rank * weight_VC.shape[0]

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """`[T] int64 -> [T, C]`."""
        if self._group.size == 1:
            return functional.embedding(token_ids_T, self.weight_VC)
        local_T = token_ids_T - self._start
        elsewhere_T = (local_T < 0) | (local_T >= self.weight_VC.shape[0])
        hidden_TC = functional.embedding(local_T.masked_fill(elsewhere_T, 0), self.weight_VC)
        return self._group.all_reduce(hidden_TC.masked_fill(elsewhere_T.unsqueeze(-1), 0.0))


class LmHead:
    """Logits over the whole vocabulary, gathered from the ranks' shares."""

    def __init__(self, weight_VC: torch.Tensor, kernels: Kernels, group: Group, vocab_size: int) -> None:
        self.weight_VC = weight_VC
        self._linear = kernels.linear
        self._group = group
        self._vocab_size = vocab_size

    def forward(self, hidden_SC: torch.Tensor) -> torch.Tensor:
        """`[S, C] -> [S, V] float32`, the same on every rank."""
        logits_SV = self._linear(hidden_SC, self.weight_VC, None).float()
        if self._group.size == 1:
            return logits_SV
        return self._group.all_gather(logits_SV, 1)[:, : self._vocab_size]
