"""What `/proc/PID/cmdline` and `/proc/PID/environ` show of a process that was forked and not started anew.

They show the memory in which the kernel laid out the arguments and the environment of the last exec. A process may
write there; Python and the C library keep copies of what they still need of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from pathlib import Path

# Positions in `/proc/self/stat`, counted from the state, which is the third.
_ARGUMENTS, _ENVIRONMENT = slice(45, 47), slice(47, 49)


def show_arguments(arguments: Iterable[bytes]) -> None:
    """Let `ps` show this command line; what finds no room is cut off."""
    _write(_ARGUMENTS, b"\0".join(arguments))


def show_environment(environment: Mapping[bytes, bytes]) -> None:
    """Let this be seen as the environment, the last names first, as they are what was added."""
    _write(_ENVIRONMENT, b"\0".join(name + b"=" + value for name, value in reversed([*environment.items()])))


def _write(area: slice, text: bytes) -> None:
    try:
        # The name, in brackets, may have spaces in it.
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        begin, end = map(int, fields[area])
    except (OSError, ValueError):  # no Linux, or one that does not tell
        return
    if 0 < begin < end:
        # The last byte stays zero: otherwise the kernel reads on behind it.
        room = end - begin
        ctypes.memmove(begin, text[: room - 1].ljust(room, b"\0"), room)
