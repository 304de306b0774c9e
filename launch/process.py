"""One named child process: its log, its end, and signals that cannot hit a stranger.

A thread starts the child, waits for it and reports its end at once. The same thread must do both: the kernel
ties PR_SET_PDEATHSIG (see `runtime.child`) to the thread that forked, so that thread lives as long as the child.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from anabranch.system.child_process import python_module, signal_name
from anabranch.system.clock import awake_s
from launch.terminal_text import visible

_TAIL_BYTES = 16384
_START_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class ProcessExit:
    """How a child ended.

    Attributes:
        code: exit code, or minus the signal's number.
        log_tail: the last lines that it wrote.
    """

    name: str
    pid: int
    code: int
    log_tail: tuple[str, ...]

    @property
    def reason(self) -> str:
        """The end in words: `exited with code 1`, `was killed by SIGKILL`."""
        if self.code >= 0:
            return f"exited with code {self.code}"
        return f"was killed by {signal_name(-self.code)}"

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}) {self.reason}"


class ChildProcess:
    """A module that runs as a child in its own session, with its output in a log file.

    Args:
        name: shown in tables, `ps` and as the prefix of echoed lines.
        module: what `python -m` runs.
        log: file that gets stdout and stderr.
        environment: the child's whole environment.
        on_exit: called once with the end, on the child's own thread.
        echo: also write each line, prefixed with the name, to stderr.
    """

    def __init__(
        self,
        *,
        name: str,
        module: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        on_exit: Callable[[ProcessExit], None],
        echo: bool = False,
    ) -> None:
        self.name = name
        self.log = log
        self._command = python_module("runtime.child", str(os.getpid()), name, module, *arguments)
        self._environment = dict(environment)
        self._on_exit = on_exit
        self._echo = echo
        self._popen: subprocess.Popen[bytes] | None = None
        self._start_error: OSError | None = None
        self._started = threading.Event()
        self._ended = threading.Event()
        # Held while the process is reaped or signalled, so that a signal never goes to a reused pid.
        self._reap_lock = threading.Lock()
        self._reaped = False
        self.exit: ProcessExit | None = None
        self._thread = threading.Thread(target=self._run, name=f"child-{name}", daemon=True)

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._popen is not None and not self._ended.is_set()

    def start(self) -> None:
        """Start the process. Raises OSError where the system refuses."""
        self._thread.start()
        self._started.wait(_START_TIMEOUT_S)
        if self._start_error is not None:
            raise self._start_error

    def terminate(self) -> None:
        """SIGTERM: asks it to drain and end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to its whole process group."""
        self._signal(signal.SIGKILL)

    def wait(self, timeout_s: float) -> ProcessExit | None:
        """The end, or None where it still runs after `timeout_s`."""
        self._ended.wait(timeout_s)
        return self.exit

    def log_tail(self, max_lines: int = 12) -> tuple[str, ...]:
        """The last lines of the log."""
        try:
            with self.log.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ()
        return tuple(text.splitlines()[-max_lines:])

    def _signal(self, number: signal.Signals) -> None:
        if self._popen is None:
            return
        with self._reap_lock, contextlib.suppress(ProcessLookupError):
            if self._reaped:
                return
            if number is signal.SIGKILL:
                os.killpg(self._popen.pid, number)
            else:
                os.kill(self._popen.pid, number)

    def _run(self) -> None:
        try:
            with self.log.open("ab") as log:
                self._popen = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if self._echo else log,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                )
        except OSError as error:
            self._start_error = error
            self._ended.set()
            return
        finally:
            self._started.set()
        pump: threading.Thread | None = None
        if self._echo:
            pump = threading.Thread(target=self._pump, name=f"log-{self.name}", daemon=True)
            pump.start()
        os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOWAIT)
        with self._reap_lock:
            code = self._popen.wait()
            self._reaped = True
        if pump is not None:
            pump.join(1.0)
        self.exit = ProcessExit(name=self.name, pid=self._popen.pid, code=code, log_tail=self.log_tail())
        self._ended.set()
        self._on_exit(self.exit)

    def _pump(self) -> None:
        assert self._popen is not None
        assert self._popen.stdout is not None
        with self.log.open("ab", buffering=0) as log, self._popen.stdout as lines:
            for line in lines:
                # A full disk must not stop the reading, or the child would wait for room in the pipe.
                with contextlib.suppress(OSError):
                    log.write(line)
                sys.stderr.write(f"[{self.name}] {visible(line.decode(errors='replace'))}")


def wait_all(children: Sequence[ChildProcess], timeout_s: float) -> list[ChildProcess]:
    """Wait until all have ended; returns those that still run after `timeout_s`."""
    deadline = awake_s() + timeout_s
    for child in children:
        # Stopped together with the children, they get the rest of their time once all go on.
        while child.alive and (left_s := deadline - awake_s()) > 0.0:
            child.wait(left_s)
    return [child for child in children if child.alive]


def stop_all(
    children: Sequence[ChildProcess], *, drain_timeout_s: float, term_timeout_s: float, kill_timeout_s: float
) -> list[str]:
    """SIGTERM (drain), SIGTERM again (end at once), SIGKILL; returns the names that had to be killed."""
    left = list(children)
    for timeout_s in (drain_timeout_s, term_timeout_s):
        for child in left:
            child.terminate()
        left = wait_all(left, timeout_s)
    killed = [child.name for child in left]
    for child in left:
        child.kill()
    wait_all(left, kill_timeout_s)
    return killed
