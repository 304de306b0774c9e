from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from anabranch.errors import InvalidRequest
from anabranch.request.sampling_params import SamplingParams
from anabranch.sampling.penalties import apply_penalties
from anabranch.sampling.sampler import Sampler
from anabranch.step.plan import SampleSpec

pytestmark = pytest.mark.unit

VOCAB = 512


def random_logits(num_rows: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def spec(
    index: int = 0, prompt_ids: tuple[int, ...] = (), output_ids: tuple[int, ...] = (), **params: object
) -> SampleSpec:
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    return SampleSpec(params=sampling, index=index, prompt_ids=prompt_ids, output_ids=output_ids)


def tokens(logits: torch.Tensor, specs: list[SampleSpec], *, plain: bool = False) -> list[int]:
    return [token for token, _ in Sampler(plain=plain).sample(logits, specs)]


RECIPES: list[dict[str, object]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "seed": 4, "top_k": 20},
    {"temperature": 1.3, "seed": 5, "top_p": 0.8},
    {"temperature": 1.0, "seed": 6, "min_p": 0.1},
    {"temperature": 0.9, "seed": 7, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "seed": 8, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 1.0, "seed": 9, "logit_bias": {3: 4.0, 9: -100.0}, "top_p": 0.95},
    {"repetition_penalty": 1.8, "logprobs": 2},
]


def recipe_spec(number: int, index: int) -> SampleSpec:
    recipe = RECIPES[number % len(RECIPES)]
    return spec(index=index, prompt_ids=(1, 2, 3, 3), output_ids=(4, 4, 5), **recipe)


def test_nothing_to_sample() -> None:
    assert Sampler().sample(torch.empty((0, VOCAB)), []) == []


def test_greedy_is_the_argmax_and_leaves_the_logits_alone() -> None:
    logits = random_logits(4)
    before = logits.clone()
    assert tokens(logits, [spec() for _ in range(4)]) == logits.argmax(dim=-1).tolist()
    tokens(logits, [recipe_spec(n, 0) for n in range(4, 8)])
    assert torch.equal(logits, before)


def test_a_token_is_the_same_alone_in_any_batch_and_after_migration() -> None:
    num_rows = 64
    logits = random_logits(num_rows)
    specs = [recipe_spec(row, index=row // 3) for row in range(num_rows)]
    together = Sampler().sample(logits, specs)
    migrated = Sampler()
    alone = [migrated.sample(logits[row : row + 1], [specs[row]])[0] for row in range(num_rows)]
    assert [token for token, _ in alone] == [token for token, _ in together]
    order = list(range(num_rows))
    random.Random(1).shuffle(order)
    shuffled = Sampler().sample(logits[order], [specs[row] for row in order])
    assert [token for token, _ in shuffled] == [together[row][0] for row in order]


def test_the_plain_sampler_draws_the_same() -> None:
    logits = random_logits(90, seed=2)
    specs = [recipe_spec(row, index=row) for row in range(90)]
    assert tokens(logits, specs) == tokens(logits, specs, plain=True)


def test_seed_and_index_both_matter() -> None:
    logits = random_logits(1, spread=0.5).expand(200, VOCAB)
    by_index = tokens(logits, [spec(index=n, temperature=1.0, seed=1) for n in range(200)])
    by_seed = tokens(logits, [spec(index=0, temperature=1.0, seed=n) for n in range(200)])
    assert len(set(by_index)) > 100
    assert len(set(by_seed)) > 100
    assert by_index != tokens(logits, [spec(index=n, temperature=1.0, seed=2) for n in range(200)])


def test_sampling_without_a_seed_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^seed: "):
        tokens(random_logits(1), [spec(temperature=1.0)])


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temperature": 1.0}, [0.4, 0.3, 0.2, 0.1, 0.0]),
        ({"temperature": 2.0}, [0.3254, 0.2818, 0.2301, 0.1627, 0.0]),
        ({"temperature": 1.0, "top_k": 2}, [0.4 / 0.7, 0.3 / 0.7, 0.0, 0.0, 0.0]),
        ({"temperature": 1.0, "top_p": 0.75}, [0.4 / 0.9, 0.3 / 0.9, 0.2 / 0.9, 0.0, 0.0]),
        ({"temperature": 1.0, "min_p": 0.6}, [0.4 / 0.7, 0.3 / 0.7, 0.0, 0.0, 0.0]),
        ({"temperature": 1.0, "logit_bias": {4: 200.0}}, [0.0, 0.0, 0.0, 0.0, 1.0]),
    ],
)
@pytest.mark.parametrize("along", ["index", "seed"])
def test_frequencies_follow_the_distribution(params: dict[str, object], expected: list[float], along: str) -> None:
    count = 8000
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = torch.cat([probabilities.log() + 3.0, torch.tensor([-100.0])]).unsqueeze(0).expand(count, 5)
    specs = [
        spec(index=n if along == "index" else 11, seed=5 if along == "index" else n, **params) for n in range(count)
    ]
    drawn = torch.tensor(tokens(logits, specs)).bincount(minlength=5).tolist()
    chi_square = 0.0
    for seen, share in zip(drawn, expected, strict=True):
        if share == 0.0:
            assert seen == 0
        else:
            chi_square += (seen - share * count) ** 2 / (share * count)
    # At most four degrees of freedom: 18.5 is passed once in a thousand. Seeds are fixed, so never by chance.
    assert chi_square < 18.5


def test_frequencies_follow_a_large_distribution() -> None:
    """Over thousands of tokens, in a vocabulary of a real size, by mass in slices of the vocabulary."""
    vocab, count = 50_000, 3000
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(3)) * 1.5
    drawn = torch.tensor(
        [tokens(logits, [spec(index=n, temperature=1.0, seed=77)])[0] for n in range(count)], dtype=torch.int64
    )
    slices = 20
    share = logits.double().softmax(dim=-1).view(slices, -1).sum(dim=1)
    seen = (drawn // (vocab // slices)).bincount(minlength=slices).double()
    chi_square = float(((seen - share * count).square() / (share * count)).sum())
    assert chi_square < 43.8, "19 degrees of freedom, once in a thousand"
    assert len(set(drawn.tolist())) > 1000


def test_very_cold_is_greedy_and_very_hot_is_even() -> None:
    logits = random_logits(1, spread=20.0).expand(400, VOCAB)
    cold = tokens(logits, [spec(index=n, temperature=1e-300, seed=1) for n in range(400)])
    assert set(cold) == {int(logits[0].argmax())}
    hot = tokens(random_logits(1).expand(400, VOCAB), [spec(index=n, temperature=100.0, seed=1) for n in range(400)])
    assert len(set(hot)) > 200


# Penalties ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(1)
    prompt, output = (1, 2, 3, 3, 499), (7, 7, 7, 2)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits.clone())
    ours = apply_penalties(logits, [spec(prompt_ids=prompt, output_ids=output, repetition_penalty=penalty)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not torch.equal(ours, logits)


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    logits = torch.zeros((1, 8))
    ours = apply_penalties(
        logits, [spec(prompt_ids=(1, 1, 2), output_ids=(2, 3, 3, 3), presence_penalty=0.5, frequency_penalty=0.25)]
    )
    assert ours.tolist() == [[0.0, 0.0, -0.75, -1.25, 0.0, 0.0, 0.0, 0.0]]


def test_penalties_and_bias_touch_only_their_rows() -> None:
    logits = random_logits(3)
    changed = apply_penalties(
        logits,
        [spec(), spec(logit_bias={5: 1.5, 6: -2.0}), spec(output_ids=(9,), presence_penalty=1.0)],
    )
    difference = changed - logits
    assert not difference[0].any()
    assert difference[1].nonzero().flatten().tolist() == [5, 6]
    torch.testing.assert_close(difference[1, 5:7], torch.tensor([1.5, -2.0]))
    assert difference[2].nonzero().flatten().tolist() == [9]


def test_bias_comes_before_the_repetition_penalty() -> None:
    logits = torch.zeros((1, 4))
    changed = apply_penalties(logits, [spec(prompt_ids=(1,), logit_bias={1: 4.0}, repetition_penalty=2.0)])
    assert changed.tolist() == [[0.0, 2.0, 0.0, 0.0]]


def test_history_outside_the_vocabulary_is_ignored() -> None:
    logits = random_logits(1)
    changed = apply_penalties(
        logits, [spec(prompt_ids=(VOCAB + 3,), output_ids=(VOCAB,), repetition_penalty=2.0, presence_penalty=1.0)]
    )
    assert torch.equal(changed, logits)


def test_an_empty_history_changes_nothing() -> None:
    logits = random_logits(1)
    assert torch.equal(apply_penalties(logits, [spec(repetition_penalty=2.0, frequency_penalty=1.0)]), logits)


# Log-probabilities --------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(4)
    specs = [
        spec(logprobs=3),
        spec(),
        spec(logprobs=0, temperature=0.5, seed=1, top_k=5, logit_bias={3: 50.0}),
        spec(logprobs=20, temperature=2.0, seed=2),
    ]
    reported = Sampler().sample(logits, specs)
    expected = logits.log_softmax(dim=-1)
    assert reported[1][1] is None
    for row, count in ((0, 3), (2, 0), (3, 20)):
        token, logprob = reported[row]
        assert logprob is not None
        assert math.isclose(logprob.logprob, float(expected[row, token]), rel_tol=1e-5)
        top = expected[row].topk(count)
        assert [token_id for token_id, _ in logprob.top] == top.indices.tolist()
        assert [value for _, value in logprob.top] == pytest.approx(top.values.tolist(), rel=1e-5)
    assert reported[2][0] == 3, "the bias chose, and the log-probability does not know of it"


def test_more_logprobs_than_tokens() -> None:
    [(_, logprob)] = Sampler().sample(torch.randn(1, 4), [spec(logprobs=20)])
    assert logprob is not None
    assert len(logprob.top) == 4
