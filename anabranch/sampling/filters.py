"""Top-k, top-p and min-p: which tokens may be drawn, and drawing from them without sorting a vocabulary.

Tokens whose scores are equal survive or go together, so that what survives never depends on how a sort broke a
tie. `survivors` is the plain way: sort, sum, mask. `draw` finds the token that the noise chooses among the
survivors without naming them all: the overall winner is the winner among the survivors if it is one of them,
and whether it is takes one sum; if not, everything not likelier than it goes, and the next winner is tried
(rejection, as in FlashInfer's sorting-free samplers, with noise that is fixed beforehand).

Shape suffixes: R rows, V vocabulary. Scores are logits over temperature, shifted so that a row's largest is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from anabranch.request.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Filters:
    """The filters of R rows, on the scores' device; None: no row has it.

    Attributes:
        top_k_R1: int64, the vocabulary's size where off.
        top_p_R1: float64, infinity where off.
        min_score_R1: float32, the logarithm of min-p, minus infinity where off.
        max_top_k: largest `top_k_R1` of those that are on.
    """

    top_k_R1: torch.Tensor | None
    top_p_R1: torch.Tensor | None
    min_score_R1: torch.Tensor | None
    max_top_k: int

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Filters:
        def column(values: Sequence[float], off: float, dtype: torch.dtype) -> torch.Tensor | None:
            if all(value == off for value in values):
                return None
            return torch.tensor(values, dtype=dtype).unsqueeze(1).to(device, non_blocking=True)

        top_ks = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        top_ps = [p.top_p if p.top_p < 1.0 else math.inf for p in params]
        min_scores = [math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params]
        return cls(
            top_k_R1=column(top_ks, vocab_size, torch.int64),
            top_p_R1=column(top_ps, math.inf, torch.float64),
            min_score_R1=column(min_scores, -math.inf, torch.float32),
            max_top_k=max((k for k in top_ks if k < vocab_size), default=0),
        )


def survivors(scores_RV: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Scores with minus infinity for what top-k, then top-p of the rest, then min-p remove."""
    descending_RV = scores_RV.sort(dim=-1, descending=True).values
    threshold_R1 = torch.full_like(scores_RV[:, :1], -torch.inf)
    if filters.top_k_R1 is not None:
        threshold_R1 = descending_RV.gather(1, filters.top_k_R1 - 1)
    if filters.top_p_R1 is not None:
        left_RV = descending_RV.masked_fill(descending_RV < threshold_R1, -torch.inf)
        weights_RV = _weights(left_RV)
        above_RV = weights_RV.cumsum(dim=1) - weights_RV
        nucleus_RV = above_RV < filters.top_p_R1 * weights_RV.sum(dim=1, keepdim=True)
        num_left_R1 = nucleus_RV.sum(dim=1, keepdim=True).clamp(min=1)
        threshold_R1 = torch.maximum(threshold_R1, descending_RV.gather(1, num_left_R1 - 1))
    if filters.min_score_R1 is not None:
        threshold_R1 = torch.maximum(threshold_R1, filters.min_score_R1)
    return scores_RV.masked_fill(scores_RV < threshold_R1, -torch.inf)


def draw(scores_RV: torch.Tensor, noise_RV: torch.Tensor, filters: Filters) -> torch.Tensor:
    """`argmax(survivors(scores) + noise)`, int64 `[R]`, without sorting."""
    if filters.top_k_R1 is not None:
        scores_RV = _top_k(scores_RV, filters.top_k_R1, filters.max_top_k)
    sums_RV = scores_RV + noise_RV
    if filters.min_score_R1 is not None:
        sums_RV.masked_fill_(scores_RV < filters.min_score_R1, -torch.inf)
    tokens_R1 = sums_RV.argmax(dim=-1, keepdim=True)
    if filters.top_p_R1 is None:
        return tokens_R1.squeeze(1)
    weights_RV = _weights(scores_RV)
    limits_R1 = filters.top_p_R1 * weights_RV.sum(dim=1, keepdim=True)
    while True:
        drawn_R1 = scores_RV.gather(1, tokens_R1)
        likelier_RV = scores_RV > drawn_R1
        rejected_R1 = (weights_RV * likelier_RV).sum(dim=1, keepdim=True) >= limits_R1
        # Ends: nothing is likelier than a row's first token, so that one is never rejected.
        rejected_R1 &= likelier_RV.any(dim=1, keepdim=True)
        if not bool(rejected_R1.any()):
            return tokens_R1.squeeze(1)
        sums_RV.masked_fill_(rejected_R1 & ~likelier_RV, -torch.inf)
        tokens_R1 = sums_RV.argmax(dim=-1, keepdim=True)


def _weights(scores_RV: torch.Tensor) -> torch.Tensor:
    """Probabilities, not normalised, float64: in float32 a sum over a vocabulary is off by more than its tail."""
    return scores_RV.exp().double()


def _top_k(scores_RV: torch.Tensor, top_k_R1: torch.Tensor, max_top_k: int) -> torch.Tensor:
    largest_RK = scores_RV.topk(max_top_k, dim=-1).values
    kth_R1 = largest_RK.gather(1, top_k_R1.clamp(max=max_top_k) - 1)
    return scores_RV.masked_fill((scores_RV < kth_R1) & (top_k_R1 < scores_RV.shape[1]), -torch.inf)
