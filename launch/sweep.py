"""Nothing is left of a cluster: neither processes nor files, whatever ends its launcher; see `launch.sweeper`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import sweeper


class Sweep:
    """From construction on a sweeper watches this process, until `now`.

    Args:
        folder: the cluster's, which its processes carry as their mark.
        paths: files that are removed with it.
    """

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        self._folder = folder
        self._paths = tuple(paths)
        read_end, self._lifeline = os.pipe()
        try:
            self._sweeper = subprocess.Popen(
                [sys.executable, "-I", "-S", sweeper.__file__, str(read_end), str(folder)]
                + [str(path) for path in (folder, *self._paths)],
                pass_fds=(read_end,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            os.close(read_end)

    def now(self, timeout_s: float) -> None:
        """Remove what is left; the sweeper ends without doing so."""
        # Children of children, should a worker have left some.
        sweeper.kill_marked(str(self._folder), timeout_s)
        shutil.rmtree(self._folder, ignore_errors=True)
        for path in self._paths:
            # A folder that could not be written cannot be cleared either.
            with contextlib.suppress(OSError):
                path.unlink()
        with contextlib.suppress(OSError):
            os.write(self._lifeline, b".")
        os.close(self._lifeline)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._sweeper.wait(timeout_s)
