"""`python -m runtime.forks PARENT_PID CONTROL_FD MODULES ...`: import the modules, then fork as ordered.

Arguments and environment have padding, which becomes the room in which a child's own are shown. What cannot be
imported fails here, so that whoever ordered starts a plain process, which says why.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys

from anabranch.system.child_process import die_with_parent
from runtime.forks.proc_text import show_arguments
from runtime.forks.server import run_order, serve_forks

if __name__ == "__main__":
    parent_pid, control_fd, modules, _ = sys.argv[1:]
    die_with_parent(int(parent_pid))
    show_arguments((b"anabranch", b"fork-server"))
    for module in modules.split(","):
        importlib.import_module(module)
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("an import started a thread, which a fork would not take along")
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        sys.exit("an import initialised CUDA, which a fork cannot use")
    order = serve_forks(socket.socket(fileno=int(control_fd)))
    if order is not None:
        run_order(order)
