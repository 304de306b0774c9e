"""Files: those from outside are regular, read without a wait and bounded; our own are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; symbolic links are followed, as caches of models consist of them.

    Raises:
        OSError: it cannot be opened, or is something else; `strerror` says what.
    """
    try:
        # Before it is opened, because that alone may wait (a FIFO) or act (a device).
        _refuse_special(path, os.stat(path))
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a zero byte, or a lone surrogate, in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    try:
        _refuse_special(path, os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, max_bytes: int) -> bytes:
    """All of a regular file.

    Raises:
        OSError: as `open_regular`; or it holds more than `max_bytes`, which is found before they are read.
    """
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        data = file.read(max_bytes + 1) if num_bytes <= max_bytes else b""
    if max(num_bytes, len(data)) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes, the most that are read", str(path))
    return data


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file of mode 0600 that appears whole or not at all. Raises OSError."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _refuse_special(path: Path, status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'special')}, not a regular file", str(path))
