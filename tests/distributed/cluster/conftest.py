"""A tiny model whose answers are known, and clusters of real workers that serve it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest
import torch

from anabranch_client import Client, Sampling
from tests.support.in_process import InProcessCluster
from tests.support.known import Known

CONTEXT = 2048
COLOCATED = ("colocated",)
SPLIT = ("prefill", "decode")


class Serve(Protocol):
    def __call__(self, *roles: str, **options: object) -> tuple[InProcessCluster, Client]: ...


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    torch.set_num_threads(1)
    return Known("llama-mqa-llama3", tmp_path_factory.mktemp("tiny"), CONTEXT)


@pytest.fixture(scope="session")
def good(known: Known) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Prompts and their answers."""
    return dict(known.clear(length, 12) for length in (3, 20, 70))


@pytest.fixture
def serve(tmp_path: Path, known: Known) -> Iterator[Serve]:
    """`serve("prefill", "decode", **options) -> (cluster, client)`; ends with the test."""
    with ExitStack() as stack:

        def start(*roles: str, **options: object) -> tuple[InProcessCluster, Client]:
            cluster = InProcessCluster(tmp_path, known.folder, roles, **options)
            stack.enter_context(cluster)
            return cluster, stack.enter_context(Client(cluster.endpoint, timeout_s=30.0))

        yield start


@pytest.fixture
def still_serves(good: dict[tuple[int, ...], tuple[int, ...]]):
    """`still_serves(cluster, client)`: nothing is left of earlier requests, and new ones get the right tokens."""

    def check(cluster: InProcessCluster, client: Client) -> None:
        cluster.wait_idle()
        for prompt, answer in good.items():
            sampling = Sampling(max_tokens=len(answer), temperature=0.0, ignore_eos=True)
            assert client.complete(prompt, sampling).token_ids == answer
        cluster.wait_idle()

    return check
