"""The file that a child's output goes to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from anabranch.errors import ConfigError


def log_file(folder: Path, name: str) -> Path:
    """The log of a child, empty or as an earlier child left it. Raises ConfigError."""
    log = folder / f"{name}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Opening a FIFO would otherwise wait for its reader.
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        os.close(descriptor)
    except OSError as error:
        raise ConfigError(
            "--log-dir", str(folder), f"{log.name} cannot be written there ({error.strerror}); name another folder"
        ) from None
    if not is_file:
        raise ConfigError("--log-dir", str(folder), f"{log.name} there is no regular file; name another folder")
    return log
