"""The file of `--ready-file`: it appears once requests can be served, and nothing of the user's gives way to it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from anabranch.errors import ConfigError

OPTION = "--ready-file"


def claim_ready_file(path: Path) -> Path:
    """Remove what an earlier cluster left there; returns the absolute path.

    Raises:
        ConfigError: there is no folder for it, nothing can be written there, or something is there that is not ours
            to remove: a folder, a device, a FIFO, a link.
    """
    path = path.absolute()
    if not path.parent.is_dir():
        raise ConfigError(OPTION, str(path), f"{path.parent} is no folder; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(OPTION, str(path), f"{path.parent} cannot be written; name a folder that can be")
    try:
        is_file = stat.S_ISREG(path.lstat().st_mode)
        if is_file:
            path.unlink()
    except FileNotFoundError:
        return path
    except OSError as error:
        raise ConfigError(OPTION, str(path), f"cannot be replaced ({error.strerror}); give another name") from None
    if not is_file:
        raise ConfigError(OPTION, str(path), "is no regular file; give another name")
    return path
