"""The engine on a GPU against transformers on the same GPU, token for token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anabranch.config.options import DtypeName
from anabranch.model.known import KNOWN_MODELS
from tests.support.engine_alone import assert_same_tokens, engine_answers, transformers_answers
from tests.support.families import RECIPES, VOCAB, save

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.e2e,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible here"),
    pytest.mark.timeout(600),
]
LENGTHS = (1, 19, 40, 90, 7)
# How close two logits are between which rounding may choose.
MAX_TIE: dict[DtypeName, float] = {"float32": 1e-3, "bfloat16": 0.25}


def prompt_ids(length: int, vocab_size: int) -> list[int]:
    return [(7 * i * i + 3 * i + 11 * length) % vocab_size for i in range(length)]


@pytest.fixture(autouse=True)
def exact_products() -> None:
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("recipe", RECIPES)
def test_families(tmp_path: Path, recipe: str) -> None:
    """In float32: in half precision, rounding decides half of what random weights answer."""
    folder = save(recipe, tmp_path / recipe)
    prompts = [prompt_ids(length, VOCAB) for length in LENGTHS]
    _, got = engine_answers(folder, prompts, 16, device="cuda", dtype="float32")
    want = transformers_answers(folder, prompts, 16, device="cuda", dtype="float32")
    assert_same_tokens(got, want, max_tie=MAX_TIE["float32"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2(dtype: DtypeName) -> None:
    model = KNOWN_MODELS["smollm2-135m"]
    if not model.available:
        pytest.skip(model.remedy)
    prompts = [prompt_ids(length, 40000) for length in (1, 33, 300, 700, 90)]
    name, got = engine_answers(
        model.folder(), prompts, 48, device="cuda", dtype=dtype, max_step_tokens=256, kv_cache_bytes=1 << 30
    )
    assert name == "flex", "FlexAttention is not used on this GPU; the log says why"
    assert_same_tokens(
        got,
        transformers_answers(model.folder(), prompts, 48, device="cuda", dtype=dtype),
        max_tie=MAX_TIE[dtype],
    )
