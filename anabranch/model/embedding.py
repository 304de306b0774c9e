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
    """Logits: each rank computes those of its share of the vocabulary.

    A share is padded (see `load_vocabulary`), so the last ranks' may hold columns that stand for no token.
    """

    def __init__(self, weight_VC: torch.Tensor, kernels: Kernels, group: Group, vocab_size: int) -> None:
        self.weight_VC = weight_VC
        self._linear = kernels.linear
        self._argmax = kernels.argmax
        self._group = group
        self._vocab_size = vocab_size
        self._start = group.rank * weight_VC.shape[0]
        self._num_held = max(0, min(weight_VC.shape[0], vocab_size - self._start))

    def share(self, hidden_SC: torch.Tensor) -> torch.Tensor:
        """`[S, C] -> [S, share]` in the model's dtype: this rank's logits; with one rank, all of them."""
        return self._linear(hidden_SC, self.weight_VC, None)

    def gather(self, share_SV: torch.Tensor) -> torch.Tensor:
        """The ranks' shares -> `[S, V]` float32, the same on every rank."""
        if self._group.size == 1:
            return share_SV.float()
        if not share_SV.shape[0]:
            return share_SV.new_empty((0, self._vocab_size), dtype=torch.float32)
        return self._group.all_gather(share_SV, 1)[:, : self._vocab_size].float()

    def argmax(self, share_SV: torch.Tensor) -> torch.Tensor:
        """`gather(share).argmax(-1)`, int64 `[S]`, the same on every rank, for 16 bytes a row and rank."""
        if self._group.size == 1:
            return self._argmax(share_SV)
        best_S2 = torch.full((share_SV.shape[0], 2), -torch.inf, dtype=torch.float64, device=share_SV.device)
        if self._num_held:
            held_SV = share_SV[:, : self._num_held]
            ids_S1 = self._argmax(held_SV).unsqueeze(-1)
            best_S2[:, :1] = held_SV.gather(1, ids_S1)
            best_S2[:, 1:] = ids_S1 + self._start
        # Both in float64, where logits and token ids are exact. `argmax` takes the first of equals (and NaN before
        # all), here among ranks as before among a rank's columns: so the lowest id, as over a whole row. A rank
        # without tokens comes last, with minus infinity, and is never first.
        best_PS2 = self._group.all_gather(best_S2.unsqueeze(0), 0)
        return best_PS2[..., 1].gather(0, best_PS2[..., 0].argmax(0, keepdim=True)).squeeze(0).long()
