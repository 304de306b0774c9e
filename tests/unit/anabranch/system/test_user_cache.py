"""One folder for all that is kept, and what happens where it cannot be written."""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from anabranch.errors import CheckpointError, DeadlineExceeded
from anabranch.model.known import KnownModel
from anabranch.system import user_cache
from anabranch.system.user_cache import cache_folder, cache_problem, cached_file, locked
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ANABRANCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HOME": "/h"}, "/h/.cache/anabranch"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/anabranch"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "relative"}, "/h/.cache/anabranch"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x", "ANABRANCH_CACHE": "/a"}, "/a"),
        ({"HOME": "/h", "ANABRANCH_CACHE": "~/a"}, "/h/a"),
        ({"HOME": "/h", "ANABRANCH_CACHE": ""}, "/h/.cache/anabranch"),
    ],
)
def test_where_it_is(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], folder: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_a_relative_one_is_of_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANABRANCH_CACHE", "here")
    assert cache_folder() == tmp_path / "here"


def test_no_other_place_chooses_a_folder_in_a_home() -> None:
    for room in (
        "anabranch",
        "transport",
        "runtime",
        "prefill",
        "decode",
        "attn_nodes",
        "ffn_nodes",
        "orchestrator",
        "launch",
    ):
        for path in (ROOT / room).rglob("*.py"):
            if path.name != "user_cache.py":
                text = path.read_text()
                assert "XDG_CACHE_HOME" not in text, path
                assert ".home()" not in text, path


@pytest.mark.parametrize("cache", ["/dev/null/cache", "/dev/null", "/proc/cache"])
def test_compiled_code_does_without_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: str) -> None:
    monkeypatch.setenv("ANABRANCH_CACHE", cache)
    problem = cache_problem()
    assert problem is not None
    assert problem.startswith(f"{cache}: the cache cannot be written (")
    assert problem.endswith("set ANABRANCH_CACHE to a folder that can be")
    built: list[Path] = []

    def build(path: Path) -> None:
        built.append(path)
        path.write_text("code")

    first = cached_file("kernels-x.so", build, timeout_s=1.0)
    assert first.read_text() == "code"
    assert first.parent.parent == tmp_path / "tmp"
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    assert cached_file("kernels-x.so", build, timeout_s=1.0) == first
    assert built == [first]


def test_a_cache_that_cannot_be_written_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))
    (tmp_path / "kernels-x.so").write_text("code")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cache_problem() is not None
    assert cached_file("kernels-x.so", lambda _: pytest.fail("was there"), timeout_s=1.0) == tmp_path / "kernels-x.so"


def test_code_that_others_could_write_is_never_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANABRANCH_CACHE", "/dev/null/cache")
    folder = tmp_path / "tmp" / f"anabranch-{os.geteuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    with pytest.raises(PermissionError, match="not this user's alone"):
        cached_file("x", Path.touch, timeout_s=1.0)
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="not this user's alone"):
        cached_file("x", Path.touch, timeout_s=1.0)
    folder.chmod(0o700)
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    folder.rename(tmp_path / "tmp" / f"anabranch-{another}")
    with pytest.raises(PermissionError, match="not this user's alone"):
        cached_file("x", Path.touch, timeout_s=1.0)


def test_one_builds_and_the_others_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))
    with locked(tmp_path / "x.lock", 1.0), pytest.raises(DeadlineExceeded, match=r"x.lock: another process has held"):
        cached_file("x.so", Path.touch, timeout_s=0.05)
    built: list[Path] = []
    inside = threading.Barrier(2, timeout=WAIT_S)

    def ask() -> None:
        inside.wait()
        cached_file("x.so", lambda path: (built.append(path), path.touch())[0], timeout_s=30.0)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert built == [tmp_path / "x.so"]


@pytest.mark.parametrize("cache", ["/dev/null/cache", "/dev/null", "/proc/cache"])
def test_a_conversion_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: str) -> None:
    monkeypatch.setenv("ANABRANCH_CACHE", cache)
    monkeypatch.setattr(KnownModel, "gguf_file", lambda _: tmp_path / "model.gguf")
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1")
    model = KnownModel(name="tiny", description="", licence="", package="tiny")
    with pytest.raises(CheckpointError, match=rf"^tiny is converted once, and {cache}/tiny-.* cannot be written \(.*"):
        model.folder()


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_folder() == Path("/nonexistent/.cache/anabranch")
    monkeypatch.setattr(user_cache.Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no")))
    assert "set ANABRANCH_CACHE" in str(cache_problem())
