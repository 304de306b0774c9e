"""Tiny random models and transformers' answers, for modules that say `CONTEXT`, `LENGTHS` and `NUM_TOKENS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from launch.process import IMPORTS
from runtime.start import prepare_forks
from tests.support.known import Known, Prompt


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """Imports what processes need while models are made."""
    prepare_forks(IMPORTS)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """What a module of many small clusters computes with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Known]:
    """`known(recipe, context=CONTEXT)`, made once."""

    @cache
    def make(recipe: str, context: int = request.module.CONTEXT) -> Known:
        return Known(recipe, tmp_path_factory.mktemp(recipe), context)

    return make


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest, known: Callable[..., Known]) -> Callable[[str], dict[Prompt, Prompt]]:
    """A recipe's prompts of all lengths and their answers, computed once."""

    @cache
    def make(recipe: str) -> dict[Prompt, Prompt]:
        model = known(recipe)
        return dict(model.clear(length, request.module.NUM_TOKENS) for length in request.module.LENGTHS)

    return make
