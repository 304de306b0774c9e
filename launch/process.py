"""One named child process: its log, its end, and signals that cannot hit a stranger.

A thread starts the child, waits for it and reports its end at once. The same thread must do both: the kernel
ties PR_SET_PDEATHSIG (see `runtime.child`) to the thread that forked, so that thread lives as long as the child.
Where a fork server makes the child, which `runtime.start` decides, the kernel ends it with that server, and the
server with this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from anabranch.system.child_process import signal_name
from anabranch.system.clock import awake_s
from launch.terminal_text import visible
from runtime.running_process import RunningProcess
from runtime.start import SHARED_IMPORTS, start_process

_TAIL_BYTES = 16384
# What the processes of a cluster import.
IMPORTS = (
    *SHARED_IMPORTS,
    "prefill.worker",
    "decode.worker",
    "attn_nodes.worker",
    "ffn_nodes.worker",
    "orchestrator.service",
    "orchestrator.resolved_model",
)


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
        self._module = module
        self._arguments = tuple(arguments)
        self._environment = dict(environment)
        self._on_exit = on_exit
        self._echo = echo
        self._process: RunningProcess | None = None
        self._start_error: OSError | None = None
        self._started = threading.Event()
        self._ended = threading.Event()
        self.exit: ProcessExit | None = None
        self._unwanted = False
        # Copies the output, where it is echoed.
        self._pumping: threading.Thread | None = None
        self._thread = threading.Thread(target=self._run, name=f"child-{name}", daemon=True)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def started(self) -> bool:
        """Whether there is, or was, a process."""
        return self._process is not None

    @property
    def ended(self) -> bool:
        """Whether there will be no process any more."""
        return self._ended.is_set()

    @property
    def alive(self) -> bool:
        return self.started and not self.ended

    def start(self) -> None:
        """Start the process. Raises OSError where the system refuses."""
        self._thread.start()
        self._started.wait()
        if self._start_error is not None:
            raise self._start_error

    def terminate(self) -> None:
        """SIGTERM: asks it to drain and end."""
        if self._process is not None:
            self._process.signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to its whole process group; one that is being started gets it as soon as it is there."""
        self._unwanted = True
        if self._process is not None:
            self._process.signal(signal.SIGKILL, group=True)

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

    def _run(self) -> None:
        try:
            output = self._open_output()
            try:
                process = self._process = start_process(
                    name=self.name,
                    module=self._module,
                    arguments=self._arguments,
                    environment=self._environment,
                    stdout=output,
                    stderr=output,
                    new_session=True,
                    imports=IMPORTS,
                )
            finally:
                os.close(output)
        except OSError as error:
            self._start_error = error
            self._ended.set()
            return
        finally:
            self._started.set()
        if self._unwanted:
            self.kill()
        code = process.wait()
        if self._pumping is not None:
            self._pumping.join(1.0)
        self.exit = ProcessExit(name=self.name, pid=process.pid, code=code, log_tail=self.log_tail())
        self._ended.set()
        self._on_exit(self.exit)

    def _open_output(self) -> int:
        """Where the child is to write: the log, or a pipe to what copies into the log and to stderr."""
        if not self._echo:
            return os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        read_end, write_end = os.pipe()
        self._pumping = threading.Thread(target=self._pump, args=(read_end,), name=f"log-{self.name}", daemon=True)
        self._pumping.start()
        return write_end

    def _pump(self, read_end: int) -> None:
        with self.log.open("ab", buffering=0) as log, open(read_end, "rb") as lines:
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
