"""A pair of planes of every kind, and of those that go over a network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.planes import PLANES, Pair, needs_ucx, open_pair


@pytest.fixture(params=PLANES)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = open_pair(request.param)
    yield pair
    pair.a.close()
    pair.b.close()


@pytest.fixture(params=["tcp", pytest.param("ucx", marks=needs_ucx)])
def network_pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = open_pair(request.param)
    yield pair
    pair.a.close()
    pair.b.close()
