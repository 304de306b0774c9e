"""Tiny models as folders, and plain attention over contiguous memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers

from anabranch.kernels.plain import PlainKernels, attend
from anabranch.model.load import load_model
from anabranch.model.transformer import Transformer
from anabranch.parallel.group import Group, SingleRank
from tests.support.families import RECIPES, VOCAB, build

MakeModel = Callable[..., tuple[Path, transformers.PreTrainedModel]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """`make_model(recipe, **overrides) -> (folder, transformers model)`, saved as a folder."""

    def make(recipe: str, *, shard_size: str = "5GB", **overrides: object) -> tuple[Path, transformers.PreTrainedModel]:
        model = build(recipe, **overrides)
        folder = tmp_path / recipe
        model.save_pretrained(folder, max_shard_size=shard_size)
        return folder, model

    return make


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@dataclass
class PlainAttention:
    """Causal attention of one sequence; K and V of all tokens so far, per layer."""

    cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k_CKD, v_CKD = k_TKD, v_TKD
        position = 0
        if layer in self.cache:
            position = self.cache[layer][0].shape[0]
            k_CKD = torch.cat((self.cache[layer][0], k_TKD))
            v_CKD = torch.cat((self.cache[layer][1], v_TKD))
        self.cache[layer] = (k_CKD, v_CKD)
        return attend(q_THD, k_CKD, v_CKD, position, scale, window)


class Session:
    """One sequence on one model: feed tokens, get the logits of each."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.attention = PlainAttention()
        self.position = 0

    def feed(self, ids: list[int]) -> torch.Tensor:
        rows = torch.arange(len(ids))
        positions = rows + self.position
        self.position += len(ids)
        share_SV = self.model.run(self.model.attention.forward(torch.tensor(ids), positions, self.attention, rows))
        return self.model.attention.lm_head.gather(share_SV)

    def generate(self, prompt: list[int], count: int) -> list[int]:
        logits = self.feed(prompt)
        tokens: list[int] = []
        for _ in range(count):
            tokens.append(int(logits[-1].argmax()))
            logits = self.feed(tokens[-1:])
        return tokens


@pytest.fixture
def session() -> type[Session]:
    return Session


@pytest.fixture
def load() -> Callable[..., Transformer]:
    """`load(path, group=...) -> Transformer` in float32 with plain kernels."""

    def run(path: Path, group: Group | None = None, dtype: torch.dtype = torch.float32) -> Transformer:
        _, model = load_model(
            str(path), dtype=dtype, device=torch.device("cpu"), kernels=PlainKernels(), group=group or SingleRank()
        )
        return model

    return run


@pytest.fixture
def prompt() -> list[int]:
    return [(7 * i * i + 3 * i + 11) % VOCAB for i in range(19)]


@pytest.fixture
def reference_tokens() -> Callable[[transformers.PreTrainedModel, list[int], int], list[int]]:
    """transformers' greedy tokens, end-of-sequence ignored."""

    def run(model: transformers.PreTrainedModel, ids: list[int], count: int) -> list[int]:
        with torch.inference_mode():
            cache = None
            tokens: list[int] = []
            step = torch.tensor([ids])
            for _ in range(count):
                out = model(step, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                tokens.append(int(out.logits[0, -1].argmax()))
                step = torch.tensor([tokens[-1:]])
        return tokens

    return run
