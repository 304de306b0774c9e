"""How a Python child process of ours is started, wherever that is done, and what it then asks of the system.

`python -m` puts the current folder before everything that is installed, so a user's `decode.py` there would run in
place of ours, and their `json.py` in place of Python's. A child imports what its parent's installation holds alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

_PATH = "PYTHONPATH"
# With it an interpreter forgets its exit status.
_INSPECT = "PYTHONINSPECT"
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_MAX_NAME_BYTES = 15


def python_module(module: str, *arguments: str) -> list[str]:
    """The command line of `python -m MODULE ARGUMENTS...`; it never looks into the current folder."""
    return [sys.executable, "-P", "-m", module, *arguments]


def signal_name(number: int) -> str:
    """`SIGKILL`; real-time signals, which have no names, are `signal 40`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def python_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for a child, and `more`.

    An empty entry of PYTHONPATH, as `PYTHONPATH=$PYTHONPATH:/folder` leaves one, means the current folder to Python
    and to hardly anyone who wrote it: such entries are left out.
    """
    environment = {**os.environ, **(more or {})}
    environment.pop(_INSPECT, None)
    if _PATH in environment:
        environment[_PATH] = os.pathsep.join(entry for entry in environment[_PATH].split(os.pathsep) if entry)
    return environment


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the thread that started this process ends; exits where it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit(f"process {os.getpid()}: the parent {parent_pid} has ended")


def set_process_name(name: str) -> None:
    """Set what `ps -o comm` shows (15 bytes)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:_MAX_NAME_BYTES], 0, 0, 0)
