"""The same survivors as transformers' warpers, and the fast way draws what the plain way draws."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from anabranch.request.sampling_params import SamplingParams
from anabranch.sampling.filters import Filters, draw, survivors
from anabranch.sampling.noise import gumbel_noise, noise_key

pytestmark = pytest.mark.unit

VOCAB = 997


def random_logits(num_rows: int, spread: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def relative(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    temperatures = torch.tensor([p.temperature for p in params]).unsqueeze(1)
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperatures


def transformers_survivors(logits_1V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """In the order of `GenerationMixin._get_logits_processor`."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return torch.isfinite(warpers(torch.zeros((1, 1), dtype=torch.int64), logits_1V))


COMBINATIONS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=0)
    for temperature, top_k, top_p, min_p in itertools.product(
        (0.3, 1.0, 1.7), (0, 1, 40, VOCAB, 5000), (1.0, 0.9, 0.4, 1e-6), (0.0, 0.05, 1.0)
    )
]


@pytest.mark.parametrize("spread", [0.5, 2.0, 8.0])
def test_survivors_are_those_of_transformers(spread: float) -> None:
    logits = random_logits(len(COMBINATIONS), spread)
    filters = Filters.of(COMBINATIONS, VOCAB, logits.device)
    ours = torch.isfinite(survivors(relative(logits, COMBINATIONS), filters))
    for row, params in enumerate(COMBINATIONS):
        theirs = transformers_survivors(logits[row : row + 1], params)[0]
        assert torch.equal(ours[row], theirs), f"{params}: {int(ours[row].sum())} against {int(theirs.sum())}"


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("ties", [False, True])
def test_the_fast_way_draws_what_the_plain_way_draws(spread: float, ties: bool) -> None:
    num_rows = len(COMBINATIONS)
    logits = random_logits(num_rows, spread, seed=1)
    if ties:
        logits = (logits * 2).round() / 2
    scores = relative(logits, COMBINATIONS)
    filters = Filters.of(COMBINATIONS, VOCAB, logits.device)
    allowed = survivors(scores, filters)
    ids = torch.arange(VOCAB, dtype=torch.int32).unsqueeze(0)
    for index in range(6):
        noise = gumbel_noise([noise_key(row, index) for row in range(num_rows)], ids)
        drawn = draw(scores, noise, filters)
        assert torch.equal(drawn, (allowed + noise).argmax(dim=-1))


def test_equal_scores_survive_together() -> None:
    scores = torch.tensor([[0.0, -1.0, -1.0, -1.0, -2.0]])
    for params in (SamplingParams(temperature=1.0, top_k=2), SamplingParams(temperature=1.0, top_p=0.6)):
        filters = Filters.of([params], 5, scores.device)
        assert torch.isfinite(survivors(scores, filters)).tolist() == [[True, True, True, True, False]]


def test_filters_that_no_row_has_are_not_made() -> None:
    filters = Filters.of([SamplingParams(top_k=0), SamplingParams(top_k=10)], 10, torch.device("cpu"))
    assert (filters.top_k_R1, filters.top_p_R1, filters.min_score_R1) == (None, None, None)


def test_broken_logits_end_too() -> None:
    params = [SamplingParams(temperature=1.0, top_p=0.5, min_p=0.1, top_k=3)] * 3
    scores = torch.zeros((3, 8))
    scores[0, 3] = torch.nan
    scores[1] = torch.nan
    scores[2] = -torch.inf
    drawn = draw(scores, torch.zeros((3, 8)), Filters.of(params, 8, scores.device))
    assert bool(((drawn >= 0) & (drawn < 8)).all())
