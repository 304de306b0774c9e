"""What `--ready-file` and `--log-dir` refuse, and that nothing of the user's is removed for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anabranch.config.topology import PoolConfig, Pools, Topology
from anabranch.errors import ConfigError
from launch.cli import app
from launch.cluster import LocalCluster
from launch.process_plan import plan_orchestrator
from launch.ready_file import claim_ready_file

pytestmark = pytest.mark.unit


def test_an_earlier_file_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ready.json"
    assert claim_ready_file(Path("ready.json")) == path
    path.write_text("{}")
    assert claim_ready_file(path) == path
    assert not path.exists()


def folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").touch()


def link(path: Path) -> None:
    (path.parent / "precious").touch()
    path.symlink_to("precious")


@pytest.mark.parametrize("make", [folder, link, os.mkfifo, lambda path: path.symlink_to("/dev/null")])
def test_what_is_no_file_stays(tmp_path: Path, make) -> None:
    path = tmp_path / "ready"
    make(path)
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["up", "--ready-file", str(path)])
    assert result.exit_code == 2
    assert result.stderr == f"error: --ready-file: '{path}': is no regular file; give another name\n"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("path", ["absent/ready", "file/ready", "\0/ready"])
def test_without_a_folder_there_is_no_file(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is no folder; make it first"):
        claim_ready_file(tmp_path / path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=f"{tmp_path} cannot be written"):
        claim_ready_file(tmp_path / "ready")


@pytest.mark.parametrize("obstacle", ["file", "fifo", "folder", "device"])
def test_logs_that_cannot_be_written_are_refused(tmp_path: Path, obstacle: str) -> None:
    logs = tmp_path / "logs"
    if obstacle == "file":
        logs.touch()
    else:
        logs.mkdir()
        log = logs / "orchestrator.log"
        make = {"fifo": os.mkfifo, "folder": os.mkdir, "device": lambda path: path.symlink_to("/dev/null")}
        make[obstacle](log)
    topology = Topology(pools=Pools(colocated=PoolConfig()))
    cluster = LocalCluster(topology, log_folder=logs)
    cluster._folder = tmp_path
    plan = plan_orchestrator(
        topology,
        "ipc://x",
        secret_file=tmp_path / "secret",
        admin_token_file=tmp_path / "token",
        endpoints_file=tmp_path / "endpoints",
    )
    with pytest.raises(ConfigError, match=r"^--log-dir: .*orchestrator.log .*; name another folder"):
        cluster._child(plan)
