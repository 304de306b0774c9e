"""What `anabranch up` says and keeps, with a cluster that is up at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from anabranch.config.topology import Topology
from anabranch_client import Unavailable
from launch import up
from launch.cli import app
from tests.support.command_process import ReadyCluster

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


@pytest.mark.parametrize("home", ["/dev/null", "/proc/home"])
def test_it_serves_without_a_record_or_a_cache(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setattr(up, "LocalCluster", ReadyCluster)
    for name in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "ANABRANCH_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home)
    result = CliRunner().invoke(app, ["up"])
    assert result.exit_code == 0, result.stderr
    assert "gRPC 127.0.0.1:1" in result.stdout
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert warnings[0].startswith(f"warning: {home}/.cache/anabranch: the cache cannot be written (")
    assert "set ANABRANCH_CACHE" in warnings[0]
    assert warnings[1].startswith(f"warning: {home}/.cache/anabranch/clusters/cluster-")
    assert warnings[1].endswith("give `anabranch generate` --endpoint 127.0.0.1:1")


def test_one_variable_moves_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(up, "LocalCluster", ReadyCluster)
    for name in ("XDG_RUNTIME_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "all"))
    result = CliRunner().invoke(app, ["up"])
    assert result.exit_code == 0
    assert "warning" not in result.stderr
    assert [path.parent for path in (tmp_path / "all").rglob("cluster-*.json")] == [tmp_path / "all" / "clusters"]


def test_a_models_name_is_no_markup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(up, "LocalCluster", ReadyCluster)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    topology = tmp_path / "topology.yaml"
    topology.write_text("model: '[/red]x[bold]'\n")
    assert CliRunner().invoke(app, ["up", str(topology)]).exit_code == 0
