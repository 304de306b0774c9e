"""Only regular files are opened, and nothing that waits, acts or never ends."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from anabranch.system.files import open_regular, read_regular

pytestmark = pytest.mark.unit


def test_a_file_and_a_link_to_it_are_read(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"abc")
    (tmp_path / "name").symlink_to("blob")
    assert read_regular(tmp_path / "name", 3) == b"abc"
    with open_regular(tmp_path / "name") as file:
        assert file.read(2) == b"ab"


def special(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "it"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("it")  # from inside the folder: the path of a socket must be short
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["FIFO", "device", "socket", "folder"])
def test_what_is_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=f"it is a {kind}, not a regular file"):
        read_regular(special(tmp_path, kind), 100)


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="more than 1,000 bytes"):
        read_regular(tmp_path / "sparse", 1000)
    # Of a size that its status does not tell.
    with pytest.raises(OSError, match="more than 10 bytes"):
        read_regular(Path("/proc/self/status"), 10)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("absent", "No such file"), ("a\0b", "null"), ("x" * 300, "name too long"), ("\ud800", "surrogates")],
)
def test_names_that_no_file_has(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(OSError, match=reason):
        open_regular(tmp_path / name)
