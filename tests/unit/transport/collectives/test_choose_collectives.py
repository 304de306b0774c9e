"""Which collectives `auto` takes, and what the log says where it is not the best."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from anabranch.errors import ConfigError, TransportUnavailable
from transport.collectives import build, choose_backend, create_group

pytestmark = pytest.mark.unit


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.load_library.cache_clear()


def test_cpu_ranks_share_memory_and_gpus_take_nccl() -> None:
    assert choose_backend("cpu") == "shm"
    assert choose_backend("cuda") == "nccl"
    assert choose_backend("cuda:1") == "nccl"


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_it_is_gloo_and_the_log_says_so(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_backend("cpu") == "gloo"
    assert "over gloo" in caplog.text
    assert "no-such-compiler" in caplog.text
    tmp_path.chmod(0o700)
    with pytest.raises(TransportUnavailable, match="no-such-compiler"):
        create_group("shm", rank=0, size=1, rendezvous=tmp_path)
    group = create_group("auto", rank=0, size=1, rendezvous=tmp_path)
    assert group.backend == "gloo"
    group.close()


def test_a_broken_build_says_what_the_compiler_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-fno-such-flag",))
    build.load_library.cache_clear()
    with pytest.raises(TransportUnavailable, match="no-such-flag"):
        build.load_library()
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".so"] == []
    build.load_library.cache_clear()


def test_rank_zero_chooses_for_all(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "backend").write_bytes(b"mpi")
    with pytest.raises(ConfigError, match="rank 0 must choose one of shm, gloo, nccl"):
        create_group("auto", rank=1, size=2, rendezvous=tmp_path)


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (-1, 2), (0, 0), (0, 65)])
def test_ranks_outside_the_group_are_refused(tmp_path: Path, rank: int, size: int) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(ConfigError, match="rank"):
        create_group("shm", rank=rank, size=size, rendezvous=tmp_path)
