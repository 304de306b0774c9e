"""A child process, started anew or forked from a fork server: its end, and signals that cannot hit a stranger."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import threading
from abc import ABC, abstractmethod
from contextlib import suppress

from runtime.forks.order import MAX_REPORT_BYTES, Ended, Report
from transport.local_frames import FrameReader


class RunningProcess(ABC):
    """One thread waits; any may send signals."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        # Held while the process is reaped or signalled: until it is reaped, its id is nobody else's.
        self._reaping = threading.Lock()
        self._reaped = False

    def wait(self) -> int:
        """Wait for the end; exit code, or minus the signal's number."""
        self._await_end()
        with self._reaping:
            self._reaped = True
            return self._reap()

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal, where the process has not ended; with `group` to all whom it leads, too."""
        with self._reaping:
            if self._reaped:
                return
            # It may not lead a group yet.
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)
            if group:
                with suppress(ProcessLookupError):
                    os.killpg(self.pid, number)

    @abstractmethod
    def _await_end(self) -> None:
        """Wait until the process has ended; its id stays taken."""

    @abstractmethod
    def _reap(self) -> int:
        """Let the id go; how the process ended."""


class StartedProcess(RunningProcess):
    """A child of this process."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        super().__init__(popen.pid)
        self._popen = popen

    def _await_end(self) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def _reap(self) -> int:
        return self._popen.wait()


class ForkedProcess(RunningProcess):
    """A child of the fork server.

    Args:
        pid: has not been reaped.
        reports: the connection on which the server reports the end.
    """

    def __init__(self, pid: int, reports: socket.socket) -> None:
        super().__init__(pid)
        self._reports = reports
        self._pidfd = os.pidfd_open(pid)
        self._reader = FrameReader[Report](Report, MAX_REPORT_BYTES)  # type: ignore[arg-type]
        # Where the server ends, the kernel kills its children.
        self._code = -signal.SIGKILL

    def _await_end(self) -> None:
        with suppress(ConnectionError):
            received = self._reader.receive(self._reports)
            if received is not None and isinstance(received[0], Ended):
                self._code = received[0].code
                return
        ended = select.poll()
        ended.register(self._pidfd, select.POLLIN)
        ended.poll()

    def _reap(self) -> int:
        os.close(self._pidfd)
        self._reports.close()
        return self._code
