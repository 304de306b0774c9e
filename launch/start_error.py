"""Why a cluster could not be started."""

from __future__ import annotations

import re

from anabranch.errors import WorkerDied
from launch.process import ProcessExit

# The last line of a process that ended on purpose: from the flags' parser, or from the log.
_ERROR_LINE = re.compile(r"(?:Error: |\S+ E \S+ \S+: )(.+)")


def start_error(death: ProcessExit) -> WorkerDied:
    """What a death before readiness means: the reason that the process gave, else its end and last lines."""
    last = death.log_tail[-1] if death.log_tail else ""
    if death.code > 0 and (match := _ERROR_LINE.fullmatch(last)):
        return WorkerDied(f"{death.name}: {match[1]}")
    lines = "\n".join(f"    {line}" for line in death.log_tail) or "    (it wrote nothing)"
    return WorkerDied(f"{death} before the cluster was ready; its last lines:\n{lines}")
