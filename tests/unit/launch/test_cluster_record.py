from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import msgspec
import psutil
import pytest

from anabranch.system.files import write_atomically
from launch.cluster_record import (
    ClusterRecord,
    record_folder,
    record_path,
    running_clusters,
    write_record,
)
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def private_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_a_running_cluster_is_found() -> None:
    assert running_clusters() == []
    path = write_record("127.0.0.1:5", "m", "/run/x/admin.token")
    (record,) = running_clusters()
    assert record.grpc == "127.0.0.1:5"
    assert record.pid == os.getpid()
    assert record.admin_token_file == "/run/x/admin.token"
    assert path == record_path()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_latest_comes_first() -> None:
    write_record("127.0.0.1:5", "m", "/run/x/admin.token")
    parent = psutil.Process(os.getppid())
    other = ClusterRecord(grpc="127.0.0.1:6", pid=parent.pid, started_s=parent.create_time(), model="m")
    path = record_path(parent.pid)
    write_atomically(path, msgspec.json.encode(other))
    os.utime(path, (2e9, 2e9))
    assert [record.grpc for record in running_clusters()] == ["127.0.0.1:6", "127.0.0.1:5"]


def test_records_of_the_dead_are_removed() -> None:
    record_folder().mkdir(parents=True)
    ended = subprocess.Popen(["true"])
    ended.wait(WAIT_S)
    dead = record_path(ended.pid)
    dead.write_bytes(msgspec.json.encode(ClusterRecord(grpc="a:1", pid=ended.pid, started_s=0.0, model="m")))
    reused = record_path(os.getppid())
    reused.write_bytes(msgspec.json.encode(ClusterRecord(grpc="a:2", pid=os.getppid(), started_s=1.0, model="m")))
    broken = record_folder() / "cluster-x.json"
    broken.write_text("{")
    assert running_clusters() == []
    assert not dead.exists()
    assert not reused.exists()


def test_without_a_runtime_folder_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.delenv("ANABRANCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert record_folder() == tmp_path / "cache" / "anabranch" / "clusters"
