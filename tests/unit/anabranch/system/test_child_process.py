"""Children of ours run our modules, whatever lies in the folder that they are started in."""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

import pytest

from anabranch.system.child_process import python_environment, python_module
from launch.process import ChildProcess
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[4]
ROOMS = (
    "anabranch",
    "anabranch_client",
    "transport",
    "runtime",
    "prefill",
    "decode",
    "attn_nodes",
    "ffn_nodes",
    "orchestrator",
    "launch",
)
# Names of ours that a user's file may have, and of the standard library.
TAKEN = ("decode", "prefill", "runtime", "transport", "launch", "orchestrator", "anabranch", "json", "runpy")


@pytest.fixture
def hostile_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in TAKEN:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\n")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "oddity", [{}, {"PYTHONPATH": f"{os.pathsep}/nowhere"}, {"PYTHONINSPECT": "1", "PYTHONSTARTUP": "json.py"}]
)
def test_a_child_runs_nothing_of_the_current_folder(
    hostile_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oddity: dict[str, str]
) -> None:
    for name, value in oddity.items():
        monkeypatch.setenv(name, value)
    child = ChildProcess(
        name="child",
        module="launch.main",
        arguments=["nosuch"],
        log=tmp_path / "child.log",
        environment=python_environment({"PYTHONUNBUFFERED": "1"}),
        on_exit=lambda _: None,
    )
    child.start()
    end = child.wait(WAIT_S)
    assert end is not None
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert end.code == 2, child.log_tail()
    assert "No such command 'nosuch'" in "\n".join(child.log_tail())


def test_without_it_the_users_file_would_run(hostile_folder: Path, tmp_path: Path) -> None:
    command = [argument for argument in python_module("decode") if argument != "-P"]
    subprocess.run(command, env={**os.environ}, timeout=60, check=False, capture_output=True)
    assert "decode" in (tmp_path / "ran").read_text()


def test_the_environment_is_this_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("", "/a", "", "/b", "")))
    monkeypatch.setenv("SOMETHING", "1")
    environment = python_environment({"MORE": "2"})
    assert environment["PYTHONPATH"] == os.pathsep.join(("/a", "/b"))
    assert (environment["SOMETHING"], environment["MORE"]) == ("1", "2")


def test_no_other_place_starts_an_interpreter() -> None:
    """`sys.executable` is named where children are started, and where the sweeper is, which is isolated (`-I`)."""
    found = {
        str(path.relative_to(ROOT))
        for room in (*ROOMS, "benchmarks")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "executable"
    }
    assert found == {"anabranch/system/child_process.py", "launch/sweep.py"}
    assert '[sys.executable, "-I", "-S", sweeper.__file__' in (ROOT / "launch" / "sweep.py").read_text()
