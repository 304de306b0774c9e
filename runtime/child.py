"""`python -m runtime.child PARENT_PID NAME MODULE ARGS...`: run a module as a child that cannot outlive its parent.

The kernel kills the process when the thread that started it ends (PR_SET_PDEATHSIG), which covers a launcher
that was itself killed. The process is named, so that `ps` and `top` show which worker is which.
"""

from __future__ import annotations

import runpy
import sys

from anabranch.system.child_process import die_with_parent, set_process_name


def main() -> None:
    parent_pid, name, module, *arguments = sys.argv[1:]
    die_with_parent(int(parent_pid))
    set_process_name(name)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
