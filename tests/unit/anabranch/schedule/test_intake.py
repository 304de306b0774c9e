"""What no engine can compute is refused, by the field's name."""

from __future__ import annotations

import msgspec
import pytest

from anabranch.errors import ContextExceeded, InvalidRequest
from anabranch.request.request import Request
from anabranch.request.sampling_params import SamplingParams
from anabranch.schedule.intake import check_request

pytestmark = pytest.mark.unit

GOOD = Request(request_id="a", epoch=1, prompt_ids=(1, 2, 3), output_ids=(4,), sampling=SamplingParams(max_tokens=5))


def check(**changes: object) -> None:
    check_request(msgspec.structs.replace(GOOD, **changes), vocab_size=10, max_context=8)


def test_what_fits_exactly_is_taken() -> None:
    check()
    check(output_ids=(4, 4, 4, 9))
    check(prompt_ids=(0,), sampling=SamplingParams(max_tokens=7))


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"prompt_ids": ()}, InvalidRequest, "prompt_ids: must not be empty"),
        ({"prompt_ids": (1, 10)}, InvalidRequest, "prompt_ids: must be from 0 to 9"),
        ({"prompt_ids": (-1,)}, InvalidRequest, "prompt_ids: must be from 0 to 9"),
        ({"output_ids": (10,)}, InvalidRequest, "prompt_ids: must be from 0 to 9"),
        ({"sampling": SamplingParams()}, InvalidRequest, "max_tokens: must be set"),
        ({"output_ids": (4,) * 5}, InvalidRequest, "max_tokens: is reached by the tokens already delivered"),
        ({"sampling": SamplingParams(max_tokens=6)}, ContextExceeded, "max_tokens: 3 prompt tokens and 6 new ones"),
        (
            {"prompt_ids": (1,) * 4},
            ContextExceeded,
            "max_tokens: 4 prompt tokens and 5 new ones exceed",
        ),
        ({"sampling": SamplingParams(max_tokens=5, temperature=float("nan"))}, InvalidRequest, "temperature: is nan"),
        ({"sampling": SamplingParams(max_tokens=-1), "output_ids": ()}, InvalidRequest, "max_tokens: "),
    ],
)
def test_what_does_not_is_refused(changes: dict[str, object], kind: type[Exception], says: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{says}") as caught:
        check(**changes)
    assert type(caught.value) is kind
