"""`anabranch generate` against a gateway that gives what the test says."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

import launch.generate
from launch.cli import app
from tests.support.gateway import Gateway

pytestmark = pytest.mark.unit


def generate(gateway: Gateway, *arguments: str, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(app, ["generate", "--endpoint", gateway.endpoint, *arguments], input=stdin)


@pytest.mark.parametrize("output", [[], ["--json"]])
@pytest.mark.parametrize(
    ("room", "asked"), [(1000, [256]), (256, [256]), (255, [256, None]), (1, [256, None]), (8, [256, None])]
)
def test_the_default_shrinks_to_what_fits(room: int, asked: list[int | None], output: list[str]) -> None:
    with Gateway(room=room) as gateway:
        result = generate(gateway, "hello", *output)
    assert result.exit_code == 0, result.stderr
    assert gateway.asked == asked
    assert "an answer" in result.stdout


@pytest.mark.parametrize("output", [[], ["--json"]])
def test_what_was_asked_for_is_refused(output: list[str]) -> None:
    with Gateway(room=8) as gateway:
        result = generate(gateway, "hello", "--max-tokens", "9", *output)
        assert gateway.asked == [9]
        assert result.exit_code == 2
        assert result.stderr == "error: max_tokens: is 9; there is room for 8\n"
        assert generate(gateway, "hello", "--max-tokens", "8").exit_code == 0


def test_a_prompt_without_any_room_is_refused() -> None:
    with Gateway(room=0) as gateway:
        result = generate(gateway, "hello")
    assert result.exit_code == 2
    assert gateway.asked == [256, None]


def test_standard_input_is_taken_byte_for_byte() -> None:
    with Gateway() as gateway:
        assert generate(gateway, "-", stdin="a\r\n\0 Grüße\n".encode()).exit_code == 0
    assert gateway.prompts == ["a\r\n\0 Grüße\n"]


@pytest.mark.parametrize("stdin", [b"\xff", b"caf\xe9", b"\xed\xb3\xbf", "x".encode("utf-16")])
def test_standard_input_that_is_no_utf_8_is_refused(stdin: bytes) -> None:
    with Gateway() as gateway:
        result = generate(gateway, "-", stdin=stdin)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: standard input is not UTF-8 text (byte ")
    assert gateway.prompts == []


def test_standard_input_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.generate, "MAX_STDIN_BYTES", 10)
    with Gateway() as gateway:
        assert generate(gateway, "-", stdin=b"x" * 10).exit_code == 0
        result = generate(gateway, "-", stdin=b"x" * 11)
    assert result.exit_code == 2
    assert result.stderr == "error: standard input has more than 10 bytes; give a shorter prompt\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["\udcff"],
        ["--chat", "\udcff"],
        ["x", "--system", "\udcff"],
        ["x", "--stop", "\udcff"],
        ["x", "--endpoint", "\udcff"],
        ["--prompt-ids", "9" * 30],
        ["--prompt-ids", "9" * 5000],
        ["--prompt-ids", "x" * 100_000],
    ],
    ids=lambda arguments: " ".join(arguments)[:20].encode("ascii", "replace").decode(),
)
def test_arguments_that_no_message_can_carry_are_refused_in_a_line(arguments: list[str]) -> None:
    with Gateway() as gateway:
        result = generate(gateway, *arguments)
    assert result.exit_code == 2, result.exception
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 300


def test_an_answers_escapes_do_not_reach_json(capsys: pytest.CaptureFixture[str]) -> None:
    with Gateway("\x1b[31m\x9d Grüße") as gateway:
        result = generate(gateway, "hello", "--json")
    assert result.stdout.isascii()
    assert json.loads(result.stdout)["text"] == "\x1b[31m\x9d Grüße"


def test_a_servers_escapes_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse: Callable[..., None] = lambda *_, **__: launch.generate.fail("[red]x[/red] :b: \x1b]0;title\a \x9b1m\r\x7f")  # noqa: E731
    monkeypatch.setattr(launch.generate, "stream_answer", refuse)
    with Gateway() as gateway:
        result = generate(gateway, "hello")
    assert result.stderr == "error: [red]x[/red] :b: \\x1b]0;title\\x07 \\x9b1m\\x0d\\x7f\n"
