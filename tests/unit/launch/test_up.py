"""What `anabranch up` says once a cluster serves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from anabranch.config.topology import Topology
from anabranch_client import Unavailable
from launch import up

pytestmark = pytest.mark.unit


class Gateway:
    """A client whose gateway serves 128 tokens of context, or has gone."""

    gone = False

    def __init__(self, endpoint: str, *, timeout_s: float) -> None:
        assert (endpoint, timeout_s) == ("here:1", up.MODEL_TIMEOUT_S)

    def __enter__(self) -> Gateway:
        return self

    def __exit__(self, *error: object) -> None: ...

    def model(self) -> SimpleNamespace:
        if self.gone:
            raise Unavailable("gone", code="unavailable")
        return SimpleNamespace(max_context=128)


@pytest.mark.parametrize(
    ("asked", "gone", "said"),
    [
        (512, False, "max_context: 512 asked, 128 served: the model's context ends there\n"),
        (128, False, ""),
        (0, False, ""),
        (512, True, ""),
    ],
)
def test_a_context_that_is_lowered_is_said(monkeypatch, capsys, asked: int, gone: bool, said: str) -> None:
    monkeypatch.setattr(up, "Client", Gateway)
    monkeypatch.setattr(Gateway, "gone", gone)
    up.say_lowered_context(Topology(max_context=asked), "here:1")
    assert capsys.readouterr().err == said
