"""Where ranks meet: a private folder that their parent made for them, used once for one group.

Rank 0 leaves a ticket there; the others wait for it. The folder must belong to this user and be closed to
others, for whoever can write to it can join the group.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from pathlib import Path

from anabranch.errors import ConfigError, DeadlineExceeded
from anabranch.system.clock import awake_s

_POLL_S = 0.002
_MAX_TICKET_BYTES = 4096


def check_folder(folder: Path) -> None:
    """Raise ConfigError unless `folder` is there, ours and private (mode 0700)."""
    try:
        info = folder.stat()
    except OSError as error:
        raise ConfigError("rendezvous", str(folder), f"must be a folder ({error.strerror})") from None
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError("rendezvous", str(folder), "must be a folder of this user's with mode 0700")


def leave_ticket(folder: Path, name: str, data: bytes) -> Path:
    """Put `data` into the folder under `name`, whole or not at all; gives the path, to be removed after use."""
    path = folder / name
    draft = folder / f".{name}.{os.getpid()}"
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
    draft.replace(path)
    return path


def read_ticket(folder: Path, name: str) -> bytes | None:
    """The ticket called `name`, or None while it is not there."""
    with contextlib.suppress(FileNotFoundError), (folder / name).open("rb") as file:
        return file.read(_MAX_TICKET_BYTES)
    return None


class Patience:
    """A named wait that polls.

    Args:
        what: of the DeadlineExceeded that ends it.
    """

    def __init__(self, what: str, timeout_s: float) -> None:
        self._what = what
        self._timeout_s = timeout_s
        self._end = awake_s() + timeout_s

    @property
    def rest_s(self) -> float:
        return max(0.0, self._end - awake_s())

    def pause(self) -> None:
        """Sleep a little. Raises DeadlineExceeded when the time is over."""
        if not self.rest_s:
            raise DeadlineExceeded(f"{self._what} did not come within start_timeout_s = {self._timeout_s} s")
        time.sleep(_POLL_S)
