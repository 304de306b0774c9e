"""Files that hold secrets: how they are made, and which ones are refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from anabranch.errors import ConfigError
from anabranch.system.private_files import MAX_SECRET_BYTES, private_folder, read_secret, runtime_folder, write_secret

pytestmark = pytest.mark.unit


def test_a_secret_is_random_and_its_users_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        one, other = write_secret(tmp_path / "one"), write_secret(tmp_path / "other")
    finally:
        os.umask(before)
    assert stat.S_IMODE(one.stat().st_mode) == 0o600
    assert len(read_secret("k", str(one))) == 64
    assert read_secret("k", str(one)) != read_secret("k", str(other))


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("kept")
    with pytest.raises(FileExistsError):
        write_secret(tmp_path / "secret")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write_secret(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o602, 0o601, 0o777])
def test_a_file_that_is_open_to_others_is_refused_with_the_remedy(mode: int, tmp_path: Path) -> None:
    path = write_secret(tmp_path / "secret")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"secret_file: .*open to other users .mode {mode:04o}.; chmod 600 it"):
        read_secret("secret_file", str(path))


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_of_its_user_is_read(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"0123456789abcdef\n")
    path.chmod(mode)
    assert read_secret("secret_file", str(path)) == b"0123456789abcdef"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "16 to 1024 bytes"),
        (b"short\n", "16 to"),
        (b" \n" * 100, "16 to"),
        (b"x" * (MAX_SECRET_BYTES + 1), "16 to"),
    ],
    ids=["empty", "short", "blank", "long"],
)
def test_what_holds_no_secret_is_refused_without_showing_it(data: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=says) as caught:
        read_secret("admin_token_file", str(path))
    assert caught.value.key == "admin_token_file"
    assert "short" not in str(caught.value) and "xxx" not in str(caught.value)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (str(tmp_path / "absent"), str(tmp_path), str(tmp_path / "fifo"), "/dev/zero", "a\0b"):
        with pytest.raises(ConfigError, match="secret_file"):
            read_secret("secret_file", path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = write_secret(tmp_path / "secret")
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        read_secret("secret_file", str(path))


def test_private_folders_are_private_and_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    inside = runtime_folder()
    assert inside.parent == tmp_path or len(str(tmp_path)) > 60
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
    outside = runtime_folder()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for folder in (inside, outside, private_folder()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert len(str(folder / "control.sock")) < 107
        folder.rmdir()
