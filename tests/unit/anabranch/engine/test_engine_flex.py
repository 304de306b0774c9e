"""The engine through FlexAttention, uncompiled on the CPU, against transformers: what a GPU is to compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anabranch.engine import build
from anabranch.kernels.flex import FlexKernels
from tests.support.engine_alone import assert_same_tokens, engine_answers, transformers_answers
from tests.support.families import VOCAB, save

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("recipe", ["qwen2-window-layers", "mixtral-window"])
def test_tokens_are_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(build, "select_kernels", lambda *_: FlexKernels(compiled=False))
    # Heads of 16 features at least: smaller ones are gathered.
    folder = save(recipe, tmp_path / recipe, head_dim=18)
    prompts = [[(7 * i * i + 3 * i + 11 * n) % VOCAB for i in range(n)] for n in (1, 19, 70)]
    name, got = engine_answers(
        folder, prompts, 6, device="cpu", dtype="float32", max_step_tokens=40, kv_cache_bytes=1 << 19
    )
    assert name == "flex"
    assert_same_tokens(got, transformers_answers(folder, prompts, 6, device="cpu", dtype="float32"))
