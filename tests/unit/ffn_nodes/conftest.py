"""Expert tables of tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from anabranch.kernels.base import Products
from anabranch.kernels.plain import PlainKernels
from anabranch.kernels.row_exact import RowExact
from anabranch.model.config import ModelConfig
from anabranch.model.digest import weights_digest
from anabranch.model.expert_table import ExpertTable
from anabranch.model.sources import resolve_model
from anabranch.parallel.group import SingleRank
from tests.support.families import build

MakeTable = Callable[..., ExpertTable]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse, dense, sparse; 6 experts, 3 chosen; a shared one, which is no business of these tests."""
    folder = tmp_path_factory.mktemp("qwen2-moe-mixed")
    build("qwen2-moe-mixed").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def config(folder: Path) -> ModelConfig:
    """The model's, with the weights' digest."""
    source = resolve_model(str(folder))
    with source.weights() as weights:
        return msgspec.structs.replace(source.config(), weights_digest=weights_digest(weights))


@pytest.fixture
def make_table(folder: Path, config: ModelConfig) -> MakeTable:
    """`make_table({layer: experts}, products=...)`."""

    def make(held: dict[int, list[int]], products: Products | None = None) -> ExpertTable:
        table = ExpertTable(
            resolve_model(str(folder)),
            config,
            dtype=torch.float32,
            device=torch.device("cpu"),
            products=products or RowExact(PlainKernels()),
            group=SingleRank(),
        )
        with table.reading() as loader:
            for layer, experts in held.items():
                table.load(loader, layer, experts)
        return table

    return make
