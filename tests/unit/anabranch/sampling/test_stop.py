from __future__ import annotations

import pytest

from anabranch.request.sampling_params import SamplingParams
from anabranch.sampling.stop import StopChecker

pytestmark = pytest.mark.unit

CHECKER = StopChecker(max_context=100)


@pytest.mark.parametrize(
    ("params", "token_id", "num_output", "num_tokens", "expected"),
    [
        ({}, 7, 1, 10, None),
        ({}, 2, 1, 10, None),
        ({"stop_token_ids": frozenset({7, 8})}, 8, 1, 10, "stop"),
        ({"stop_token_ids": frozenset({7, 8})}, 2, 1, 10, None),
        ({"max_tokens": 3}, 7, 2, 10, None),
        ({"max_tokens": 3}, 7, 3, 10, "length"),
        ({"max_tokens": 3, "stop_token_ids": frozenset({2})}, 2, 3, 10, "stop"),
        ({}, 7, 1, 99, None),
        ({}, 7, 1, 100, "length"),
        ({"max_tokens": 500}, 7, 60, 100, "length"),
    ],
)
def test_reasons(
    params: dict[str, object], token_id: int, num_output: int, num_tokens: int, expected: str | None
) -> None:
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    assert CHECKER.check(sampling, token_id, num_output=num_output, num_tokens=num_tokens) == expected
