"""`python -m runtime.child PARENT_PID NAME MODULE ARGS...`: run a module as a child that cannot outlive its parent.

The kernel kills the process when the thread that started it ends (PR_SET_PDEATHSIG), which covers a launcher
that was itself killed. The process is named, so that `ps` and `top` show which worker is which.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_MAX_NAME_BYTES = 15


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the parent ends; exits at once where it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit(f"runtime.child: the parent {parent_pid} has ended")


def set_process_name(name: str) -> None:
    """Set what `ps -o comm` shows (15 bytes)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:_MAX_NAME_BYTES], 0, 0, 0)


def main() -> None:
    parent_pid, name, module, *arguments = sys.argv[1:]
    die_with_parent(int(parent_pid))
    set_process_name(name)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
