"""Real child processes: how they end, what is said of it, and that nothing outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launch import sweeper
from launch.process import ChildProcess, ProcessExit, stop_all
from tests.support.waiting import WAIT_S, eventually

pytestmark = pytest.mark.unit


@pytest.fixture
def child(tmp_path: Path) -> Callable[..., ChildProcess]:
    """Makes a child that runs the given source."""

    def make(
        source: str, *, name: str = "one", on_exit: Callable[[ProcessExit], None] = lambda _: None
    ) -> ChildProcess:
        module = f"child_{name}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        made = ChildProcess(
            name=name,
            module=module,
            arguments=["a", "b c"],
            log=tmp_path / f"{name}.log",
            environment={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": "1"},
            on_exit=on_exit,
        )
        made.start()
        return made

    return make


READY_THEN_SLEEP = """
    import signal, sys
    print("ready", flush=True)
    signal.pause()
"""


def wait_ready(child: ChildProcess) -> None:
    eventually(lambda: child.log_tail() == ("ready",))


def test_exit_code_log_and_callback(child: Callable[..., ChildProcess]) -> None:
    ends: list[ProcessExit] = []
    process = child("import sys; print(sys.argv[1:], __name__); sys.exit(3)", on_exit=ends.append)
    end = process.wait(WAIT_S)
    assert end is not None
    assert end.code == 3
    assert end.reason == "exited with code 3"
    assert end.log_tail == ("['a', 'b c'] __main__",)
    eventually(lambda: ends == [end])
    assert not process.alive


def test_a_killed_child_is_noticed(child: Callable[..., ChildProcess]) -> None:
    noticed = threading.Event()
    process = child(READY_THEN_SLEEP, on_exit=lambda _: noticed.set())
    wait_ready(process)
    os.kill(process.pid, signal.SIGKILL)
    assert noticed.wait(WAIT_S)
    assert process.exit is not None
    assert str(process.exit) == f"one (pid {process.pid}) was killed by SIGKILL"


def test_a_child_is_named(child: Callable[..., ChildProcess]) -> None:
    process = child(READY_THEN_SLEEP, name="prefill-7")
    wait_ready(process)
    assert Path(f"/proc/{process.pid}/comm").read_text().strip() == "prefill-7"
    process.kill()
    assert process.wait(WAIT_S) is not None


def test_stop_asks_before_it_kills(child: Callable[..., ChildProcess]) -> None:
    gentle = child(
        """
        import signal, sys
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        print("ready", flush=True)
        signal.pause()
        """,
        name="gentle",
    )
    deaf = child(
        """
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready", flush=True)
        while True: signal.pause()
        """,
        name="deaf",
    )
    wait_ready(gentle)
    wait_ready(deaf)
    killed = stop_all([gentle, deaf], drain_timeout_s=0.2, term_timeout_s=0.2, kill_timeout_s=WAIT_S)
    assert killed == ["deaf"]
    assert gentle.exit is not None
    assert gentle.exit.code == 0
    assert deaf.exit is not None
    assert deaf.exit.code == -signal.SIGKILL


def test_signals_after_the_end_hit_nobody(child: Callable[..., ChildProcess]) -> None:
    process = child("pass")
    assert process.wait(WAIT_S) is not None
    process.terminate()
    process.kill()


def test_a_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(f"""
                import os, threading
                from pathlib import Path
                from launch.process import ChildProcess
                child = ChildProcess(name="x", module="sleeper", arguments=[], log=Path("{tmp_path}/x.log"),
                    environment={{**os.environ, "PYTHONPATH": "{tmp_path}"}}, on_exit=lambda _: None)
                child.start()
                print(child.pid, flush=True)
                threading.Event().wait()
            """),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    (tmp_path / "sleeper.py").write_text("import signal\nprint('ready', flush=True)\nsignal.pause()\n")
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    eventually(lambda: (tmp_path / "x.log").exists() and "ready" in (tmp_path / "x.log").read_text())
    parent.kill()
    parent.wait(WAIT_S)
    eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    parent.stdout.close()


def start_sweeper(mark: str, *paths: Path) -> tuple[subprocess.Popen[bytes], int]:
    read_end, lifeline = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", sweeper.__file__, str(read_end), mark, *map(str, paths)], pass_fds=(read_end,)
    )
    os.close(read_end)
    return process, lifeline


def test_the_sweeper_removes_what_a_killed_launcher_left(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    folder.mkdir()
    (folder / "control.sock").write_text("")
    record = tmp_path / "record.json"
    record.write_text("{}")
    mark = str(folder)
    left = subprocess.Popen(["sleep", "600"], env={**os.environ, sweeper.MARK: mark}, start_new_session=True)
    stranger = subprocess.Popen(["sleep", "600"], env={**os.environ, sweeper.MARK: mark + "-other"})
    process, lifeline = start_sweeper(mark, folder, record, tmp_path / "never-written")
    os.close(lifeline)
    assert left.wait(WAIT_S) == -signal.SIGKILL
    assert process.wait(WAIT_S) == 0
    assert not folder.exists()
    assert not record.exists()
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait(WAIT_S)


def test_the_sweeper_leaves_all_alone_after_a_clean_end(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    folder.mkdir()
    process, lifeline = start_sweeper(str(folder), folder)
    os.write(lifeline, b".")
    os.close(lifeline)
    assert process.wait(WAIT_S) == 0
    assert folder.exists()
