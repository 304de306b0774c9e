"""Where this user's files are kept between runs: converted models, compiled code, records of running clusters.

$ANABRANCH_CACHE moves all of it. Compiled code does without the cache where that cannot be written: it goes to a
folder of the user's own among the system's temporary files.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from anabranch.errors import DeadlineExceeded

logger = logging.getLogger(__name__)

VARIABLE = "ANABRANCH_CACHE"
_LOCK_POLL_S = 0.05
# Debian's home of users that have none.
_NO_HOME = "/nonexistent"


def cache_folder() -> Path:
    """`$ANABRANCH_CACHE`, or `anabranch` in `$XDG_CACHE_HOME` or `~/.cache`; it may not exist, or not be writable."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(os.path.expanduser(named)).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: a relative path counts as none
        home = os.path.expanduser("~")
        base = os.path.join(home if os.path.isabs(home) else _NO_HOME, ".cache")
    return Path(base) / "anabranch"


def cache_problem() -> str | None:
    """Why the cache cannot be written, with the remedy; None where it can. Makes the folder."""
    folder = cache_folder()
    reason: str | None = "no permission, or a read-only file system"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return None
    except OSError as error:
        reason = error.strerror
    return f"{folder}: the cache cannot be written ({reason}); set {VARIABLE} to a folder that can be"


def cached_file(name: str, build: Callable[[Path], None], *, timeout_s: float) -> Path:
    """The file `name` of compiled code, built where it is not there yet, by one process for all.

    Args:
        build: writes the file, whole or not at all.
        timeout_s: longest wait for another process that builds.

    Raises:
        OSError: there is no folder to write it to.
        DeadlineExceeded: another process has been building for too long.
    """
    path = cache_folder() / name
    with suppress(OSError):  # it cannot be looked into
        if path.exists():
            return path
    problem = cache_problem()
    if problem is not None:
        path = _temporary_folder() / name
        logger.warning("%s; meanwhile compiled code goes to %s", problem, path.parent)
    with locked(path.with_suffix(".lock"), timeout_s):
        if not path.exists():
            build(path)
    return path


@contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system frees it when its holder ends, however it ends.

    Raises:
        OSError: the file cannot be written.
        DeadlineExceeded: another process held the lock for `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(f"{path}: another process has held it for {timeout_s:.0f} s") from None
                time.sleep(_LOCK_POLL_S)
        yield


def _temporary_folder() -> Path:
    """A folder for this user's compiled code alone: what others may write to must never be loaded.

    Raises:
        OSError: it cannot be made, or its name is taken by somebody else's.
    """
    folder = Path(tempfile.gettempdir()) / f"anabranch-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is not this user's alone")
    return folder
