"""How a Python child process of ours is started, wherever that is done.

`python -m` puts the current folder before everything that is installed, so a user's `decode.py` there would run in
place of ours, and their `json.py` in place of Python's. A child imports what its parent's installation holds alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

_PATH = "PYTHONPATH"
# With it an interpreter forgets its exit status.
_INSPECT = "PYTHONINSPECT"


def python_module(module: str, *arguments: str) -> list[str]:
    """The command line of `python -m MODULE ARGUMENTS...`; it never looks into the current folder."""
    return [sys.executable, "-P", "-m", module, *arguments]


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
