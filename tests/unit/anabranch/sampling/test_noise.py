from __future__ import annotations

import math

import pytest
import torch

from anabranch.sampling.noise import gumbel_noise, noise_key

pytestmark = pytest.mark.unit


def plain_noise(key: tuple[int, int], token_id: int) -> float:
    """The same hash in Python's integers."""
    low, high = (word & 0xFFFFFFFF for word in key)
    x = (token_id * 0x9E3779B9 + low) & 0xFFFFFFFF
    x ^= x >> 16
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x ^= high
    x ^= x >> 15
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    x ^= x >> 16
    uniform = min(((x & 0x7FFFFFFF) + 0.5) * 2.0**-31, 1.0 - 2.0**-24)
    return -math.log(-math.log1p(-uniform))


def test_equals_the_hash_in_plain_integers() -> None:
    ids = torch.arange(999, dtype=torch.int32).unsqueeze(0)
    keys = [noise_key(seed, index) for seed, index in ((0, 0), (1, 0), (0, 1), (2**63 - 1, 12345))]
    noise = gumbel_noise(keys, ids)
    assert noise.dtype == torch.float32
    expected = torch.tensor([[plain_noise(key, token) for token in range(999)] for key in keys])
    torch.testing.assert_close(noise, expected, rtol=1e-4, atol=1e-5)


def test_candidates_get_the_noise_that_they_have_in_the_whole_vocabulary() -> None:
    keys = [noise_key(7, 3), noise_key(8, 3)]
    whole = gumbel_noise(keys, torch.arange(5000, dtype=torch.int32).unsqueeze(0))
    some = torch.tensor([[4999, 0, 17], [3, 4, 4998]], dtype=torch.int32)
    assert torch.equal(gumbel_noise(keys, some), whole.gather(1, some.long()))


def test_keys_differ_by_seed_and_index() -> None:
    keys = {noise_key(seed, index) for seed in range(100) for index in range(100)}
    assert len(keys) == 10_000


@pytest.mark.parametrize("axis", ["tokens", "indices", "seeds"])
def test_is_gumbel_distributed_along_every_axis(axis: str) -> None:
    count = 20_000
    if axis == "tokens":
        noise = gumbel_noise([noise_key(5, 9)], torch.arange(count, dtype=torch.int32).unsqueeze(0))
    else:
        keys = [noise_key(5, n) if axis == "indices" else noise_key(n, 9) for n in range(count)]
        noise = gumbel_noise(keys, torch.tensor([[31]], dtype=torch.int32))
    values = noise.flatten().double().sort().values
    cdf = torch.exp(-torch.exp(-values))
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed once in a thousand.
    assert float((cdf - steps).abs().max()) < 1.95 / math.sqrt(count)


def test_neighbours_are_not_correlated() -> None:
    noise = gumbel_noise([noise_key(3, n) for n in range(64)], torch.arange(4096, dtype=torch.int32).unsqueeze(0))
    noise = noise.double() - noise.double().mean()
    variance = float(noise.square().mean())
    along_tokens = float((noise[:, 1:] * noise[:, :-1]).mean()) / variance
    along_indices = float((noise[1:] * noise[:-1]).mean()) / variance
    assert abs(along_tokens) < 0.01
    assert abs(along_indices) < 0.01
