"""Files and folders that no other user may read: sockets, the control channel's secret, Admin's token."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from pathlib import Path

from anabranch.errors import ConfigError

MIN_SECRET_BYTES = 16
MAX_SECRET_BYTES = 1024
_SECRET_BYTES = 32
# A socket's path has at most 107 characters.
_MAX_FOLDER_CHARS = 80
_HOW_TO_MAKE = "make one with: (umask 077; openssl rand -hex 32 > FILE)"


def private_folder() -> Path:
    """A new folder of mode 0700 in the system's temporary folder, with a path that is short enough for a socket."""
    folder = tempfile.mkdtemp(prefix="anabranch-")
    if len(folder) > _MAX_FOLDER_CHARS:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="anabranch-", dir="/tmp")
    return Path(folder)


def runtime_folder() -> Path:
    """Like `private_folder`, but in the user's own `$XDG_RUNTIME_DIR` where there is one that can be written."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base and len(base) <= _MAX_FOLDER_CHARS - 20 and os.access(base, os.W_OK | os.X_OK):
        return Path(tempfile.mkdtemp(prefix="anabranch-", dir=base))
    return private_folder()


def write_secret(path: Path) -> Path:
    """Write a new random secret to a new file of mode 0600; returns the path."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(_SECRET_BYTES) + "\n")
    return path


def read_secret(key: str, path: str) -> bytes:
    """The secret in a file, white space at its end left out.

    Args:
        key: the configuration key that named the file, for errors.

    Raises:
        ConfigError: the file cannot be read, is no regular file, belongs to somebody else, can be read or written by
            others, or holds no secret.
    """
    try:
        # Not to wait for a writer where the path is a FIFO.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(key, path, f"cannot be read ({reason}); {_HOW_TO_MAKE}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(key, path, f"is no regular file; {_HOW_TO_MAKE}")
        if status.st_uid not in (os.geteuid(), 0):
            raise ConfigError(key, path, f"belongs to user {status.st_uid}, not to this one; {_HOW_TO_MAKE}")
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o077:
            raise ConfigError(key, path, f"is open to other users (mode {mode:04o}); chmod 600 it")
        data = os.read(descriptor, MAX_SECRET_BYTES + 1)
    finally:
        os.close(descriptor)
    secret = data.rstrip()
    if not len(secret) >= MIN_SECRET_BYTES or len(data) > MAX_SECRET_BYTES:
        raise ConfigError(
            key, path, f"must hold {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes of secret; {_HOW_TO_MAKE}"
        )
    return secret
