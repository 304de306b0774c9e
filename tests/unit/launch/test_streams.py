"""Every command with standard streams that are closed, full, or that nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.gateway import Gateway
from tests.support.peer_process import PeerProcess, peer_processes

pytestmark = pytest.mark.unit

LOST = "error: standard output cannot be written ("
ANSWER = "red \x1b[31m, bell \a, title \x9d0;x\x9c, line\nand\ttab, Grüße"

# Command line -> a word that its standard output holds.
COMMANDS = {
    "--help": "Usage",
    "--version": "anabranch",
    "models": "smollm2-135m",
    "doctor": "cores",
    "generate hello": "tab",
    "generate hello --json": "tab",
    "verify TOPOLOGY": "equal",
    "verify TOPOLOGY --json": '"ok": true',
    "up TOPOLOGY": "decode-0",
}


class Commands:
    def __init__(self, process: PeerProcess, endpoint: str, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.env = {
            "ANABRANCH_ENDPOINT": endpoint,
            "ANABRANCH_CACHE": str(folder / "cache"),
            "XDG_RUNTIME_DIR": str(folder),
            "TERM": "xterm-256color",
        }
        self.topology = folder / "topology.yaml"
        self.topology.write_text("")

    def run(self, command: str, env: dict[str, str] | None = None, **streams: str) -> dict[str, object]:
        argv = [str(self.topology) if word == "TOPOLOGY" else word for word in command.split()]
        ran = self.process.ask(argv=argv, env={**self.env, **(env or {})}, **streams)
        said = f"{ran['stdout']}{ran['stderr']}{ran['terminal']}"
        assert "Traceback" not in said, said
        assert "Exception ignored" not in said, said
        return ran


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("commands")
    with peer_processes("tests.support.command_process") as start, Gateway(ANSWER) as gateway:
        yield Commands(start(), gateway.endpoint, folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_lost_output_is_no_success(commands: Commands, command: str) -> None:
    for kind in ("closed", "full"):
        ran = commands.run(command, stdout=kind)
        assert ran["code"] == 1, (kind, ran)
        assert str(ran["stderr"]).count(LOST) == 1
    gone = commands.run(command, stdout="gone")
    assert gone["code"] == 141
    assert "error" not in str(gone["stderr"])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_does_without_the_other_streams(commands: Commands, command: str) -> None:
    for stdin, stderr in (("empty", "file"), ("closed", "closed"), ("empty", "full")):
        ran = commands.run(command, stdin=stdin, stderr=stderr)
        assert ran["code"] == 0, ran
        assert COMMANDS[command] in str(ran["stdout"])
    assert commands.run(command, stdin="closed", stdout="closed", stderr="closed")["code"] == 1


@pytest.mark.parametrize("command", ["generate", "nosuch"])
def test_a_usage_error_keeps_its_code(commands: Commands, command: str) -> None:
    for kind in ("closed", "gone"):
        assert commands.run(command, stderr=kind)["code"] == 2


def test_a_closed_standard_input_is_named(commands: Commands) -> None:
    ran = commands.run("generate -", stdin="closed")
    assert ran["code"] == 1
    assert str(ran["stderr"]).startswith("error: standard input cannot be read")


def test_a_terminal_obeys_no_answer(commands: Commands) -> None:
    assert str(commands.run("generate hello")["stdout"]) == f"{ANSWER}\n"
    shown = str(commands.run("generate hello", stdout="terminal")["terminal"])
    assert "red \\x1b[31m, bell \\x07, title \\x9d0;x\\x9c, line\r\nand" in shown
    assert not {"\x1b", "\a", "\x9d", "\x9c"} & set(shown)


def test_text_that_the_encoding_lacks_is_escaped() -> None:
    """In a process of its own, which asks the environment for its encoding."""
    with Gateway("Grüße") as gateway:
        environment = {**os.environ, "PYTHONIOENCODING": "ascii", "ANABRANCH_ENDPOINT": gateway.endpoint}
        ran = anabranch_with(lambda: None, "generate", "hello", environment=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "Gr\\xfc\\xdfe\n"


def test_streams_that_are_closed_from_the_start() -> None:
    """The same in a process of its own, where Python finds no stream at all."""

    def close_all() -> None:
        for number in (0, 1, 2):
            os.close(number)

    assert anabranch_with(close_all, "--version").returncode == 1


@pytest.mark.parametrize(("columns", "term"), [("0", "xterm"), ("1", "dumb"), ("²", "dumb")])
def test_a_terminal_without_width_gets_everything(commands: Commands, columns: str, term: str) -> None:
    env = {"COLUMNS": columns, "TERM": term, "NO_COLOR": "1"}
    ran = commands.run("up TOPOLOGY", env, stdout="terminal", stderr="terminal")
    assert ran["code"] == 0
    assert "decode-0" in str(ran["terminal"])
    assert "127.0.0.1:1" in str(ran["terminal"])
    if term == "dumb":
        assert "\x1b" not in str(ran["terminal"])
    assert "doctor" in str(commands.run("--help", env, stdout="terminal")["terminal"])


def anabranch_with(
    before: Callable[[], None], *argv: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.main", *argv],
        preexec_fn=before,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
