"""Children from the fork server are what children that were started anew are, and nothing outlives its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from anabranch.system.child_process import python_environment
from launch import process as launch_process
from launch import sweeper
from runtime import start
from runtime.forks.client import FORK_TIMEOUT_S
from runtime.running_process import ForkedProcess, RunningProcess, StartedProcess
from tests.support.waiting import WAIT_S, eventually

pytestmark = pytest.mark.unit

MODULE = "tests.support.child_report"


class Child:
    """A child on a thread of its own, which waits for it."""

    def __init__(self, log: Path, environment: dict[str, str], *arguments: str, name: str = "reporter-7") -> None:
        self.log = log
        self.code: int | None = None
        self._running: list[RunningProcess] = []
        self._thread = threading.Thread(target=self._keep, args=(environment, arguments, name), daemon=True)
        self._thread.start()
        # The first waits for the server's imports.
        eventually(lambda: bool(self._running), within_s=FORK_TIMEOUT_S)

    def _keep(self, environment: dict[str, str], arguments: tuple[str, ...], name: str) -> None:
        with self.log.open("ab") as log:
            process = start.start_process(
                name=name,
                module=MODULE,
                arguments=arguments,
                environment=environment,
                stdout=log.fileno(),
                stderr=log.fileno(),
                new_session=True,
                imports=launch_process.IMPORTS,
            )
        self._running.append(process)
        self.code = process.wait()

    @property
    def process(self) -> RunningProcess:
        return self._running[0]

    def report(self) -> dict[str, Any]:
        eventually(lambda: self.log.read_text().endswith("\n"))
        return json.loads(self.log.read_text().splitlines()[0])  # type: ignore[no-any-return]

    def end(self) -> int:
        self._thread.join(WAIT_S)
        assert self.code is not None
        return self.code


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    made: list[Child] = []

    def make(*arguments: str, environment: dict[str, str] | None = None, name: str = "reporter-7") -> Child:
        whole = python_environment({"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}) | (environment or {})
        made.append(Child(tmp_path / f"{len(made)}.log", whole, *arguments, name=name))
        return made[-1]

    yield make
    for each in made:
        each.process.signal(signal.SIGKILL, group=True)
        each.end()


def test_a_fork_is_what_a_new_process_would_be(
    child: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("LEFT_OUT", "1")
    monkeypatch.delenv("LEFT_OUT")
    own = {"TMPDIR": str(tmp_path / "temporary"), "ANABRANCH_ODD": "\udcff", sweeper.MARK: str(tmp_path)}
    forked = child("threads", environment=own)
    # What a library reads as it is loaded differs, so this one is started anew.
    started = child("threads", environment=own | {"MKL_VERBOSE": "0"})
    assert isinstance(forked.process, ForkedProcess)
    assert isinstance(started.process, StartedProcess)
    assert forked.end() == started.end() == 0, forked.log.read_text() + started.log.read_text()
    fork, new = forked.report(), started.report()
    assert fork["modules"] and not new["modules"]
    assert not fork["cuda"]
    assert fork["session"] == fork["pid"] == forked.process.pid
    assert new["session"] == new["pid"]
    assert fork["random"] != new["random"] != child("exit", "0").report()["random"] != fork["random"]
    assert fork["threads"] == new["threads"] == [3, 3]
    new["environment"].pop("MKL_VERBOSE")
    for same in ("name", "arguments", "module", "folder", "environment", "cores", "stdin", "temporary", "handlers"):
        assert fork[same] == new[same], same
    assert [text for text in fork["descriptors"] if "pipe" not in text] == new["descriptors"] == []
    assert fork["folder"] == str(tmp_path / "here")
    assert fork["command"] == ["anabranch", "reporter-7", MODULE, "threads"]
    assert sorted(fork["seen"]) == sorted(f"{name}={value}" for name, value in fork["environment"].items())


@pytest.fixture
def quick_source(monkeypatch: pytest.MonkeyPatch) -> start._Source:
    """A server of a test's own, which imports next to nothing."""
    source = start._Source()
    monkeypatch.setattr(start, "_source", source)
    monkeypatch.setattr(launch_process, "IMPORTS", ("runtime.child",))
    return source


@pytest.mark.parametrize(("order", "code"), [("exit 0", 0), ("exit 3", 3), ("raise", 1), ("die", -signal.SIGABRT)])
def test_ends_are_reported(child: Callable[..., Child], order: str, code: int) -> None:
    made = child(*order.split())
    assert made.end() == code
    assert ("ValueError: as told" in made.log.read_text()) == (order == "raise")
    # Its id may be another's by now.
    made.process.signal(signal.SIGKILL, group=True)


def test_signals_reach_a_fork_and_marks_tell_clusters_apart(child: Callable[..., Child], tmp_path: Path) -> None:
    one, two = (
        child("wait", environment={sweeper.MARK: f"{tmp_path}/{name}"}, name=name) for name in ("first", "second")
    )
    assert sweeper.marked_processes(f"{tmp_path}/first") == [one.process.pid]
    assert one.report()["pid"] == one.process.pid
    assert sweeper.kill_marked(f"{tmp_path}/first") == [one.process.pid]
    assert one.end() == -signal.SIGKILL
    assert two.report()["parent"] == psutil.Process(two.process.pid).ppid()
    two.process.signal(signal.SIGTERM)
    assert two.end() == -signal.SIGTERM


@pytest.mark.usefixtures("quick_source")
def test_a_lost_server_loses_its_children_and_there_is_another(child: Callable[..., Child]) -> None:
    one = child("wait")
    server = one.report()["parent"]
    os.kill(server, signal.SIGKILL)
    assert one.end() == -signal.SIGKILL
    assert not psutil.pid_exists(one.process.pid) or psutil.Process(one.process.pid).status() == "zombie"
    # The first that is wanted finds the server gone, and is there all the same.
    assert child("exit", "5").end() == 5
    again = child("exit", "0")
    assert isinstance(again.process, ForkedProcess)
    assert again.end() == 0
    assert again.report()["parent"] != server


def test_without_a_server_children_are_started(
    child: Callable[..., Child], quick_source: start._Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_process, "IMPORTS", ("nosuchmodule",))
    for code in (4, 5):
        made = child("exit", str(code))
        assert isinstance(made.process, StartedProcess)
        assert made.end() == code
    assert not quick_source._possible


def test_nothing_outlives_a_killed_launcher(tmp_path: Path) -> None:
    code = f"""
        import threading
        from pathlib import Path
        from anabranch.system.child_process import python_environment
        from launch import process
        process.IMPORTS = ("runtime.child",)
        child = process.ChildProcess(name="x", module={MODULE!r}, arguments=["wait"], log=Path("{tmp_path}/x.log"),
            environment=python_environment(), on_exit=lambda _: None)
        child.start()
        print(child.pid, flush=True)
        threading.Event().wait()
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as lines:
        pid = int(lines.readline())
    processes = psutil.Process(parent.pid).children(recursive=True)
    assert [process.pid for process in processes][-1:] == [pid]
    assert [process.name() for process in processes[:-1]] == ["fork-server"]
    parent.kill()
    parent.wait(WAIT_S)
    eventually(lambda: not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE])
