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
    """Logits: each rank computes those of its share of the vocabulary."""

    def __init__(self, weight_VC: torch.Tensor, kernels: Kernels, group: Group, vocab_size: int) -> None:
        self.weight_VC = weight_VC
        self._linear = kernels.linear
        self._argmax = kernels.argmax
        self._group = group
        self._vocab_size = vocab_size

    def share(self, hidden_SC: torch.Tensor) -> torch.Tensor:
        """`[S, C] -> [S, share]` in the model's dtype: this rank's logits; with one rank, all of them."""
        return self._linear(hidden_SC, self.weight_VC, None)

    def gather(self, share_SV: torch.Tensor) -> torch.Tensor:
        """The ranks' shares -> `[S, V]` float32, the same on every rank."""
        if self._group.size == 1:
            return share_SV.float()
        if not share_SV.shape[0]:
            return share_SV.new_empty((0, self._vocab_size), dtype=torch.float32)
        return self._group.all_gather(share_SV.float(), 1)[:, : self._vocab_size]

    def argmax(self, share_SV: torch.Tensor) -> torch.Tensor:
        """`gather(share).argmax(-1)`, int64 `[S]`, the same on every rank."""
        if self._group.size == 1:
            return self._argmax(share_SV)
        return self.gather(share_SV).argmax(-1)
