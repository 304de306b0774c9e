from __future__ import annotations

import io

import pytest
from rich.console import Console

from launch.terminal_text import said, visible

pytestmark = pytest.mark.unit


def test_only_newline_and_tab_are_obeyed() -> None:
    controls = "".join(map(chr, (*range(0x20), 0x7F, *range(0x80, 0xA0))))
    shown = visible(controls)
    assert [character for character in shown if not character.isprintable()] == ["\t", "\n"]
    assert visible("Grüße, 東京 🚲\u200d\xa0[b]") == "Grüße, 東京 🚲\u200d\xa0[b]"


@pytest.mark.parametrize("text", ["[bold]x[/bold]", "[/nothing]", "back\\[slash]", "\x1b[31mred", "a\rb", "\x9b1m"])
def test_a_console_shows_what_was_said(text: str) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor", highlight=False, width=200)
    console.print(f"[bold]before[/bold] {said(text)}|")
    assert file.getvalue() == f"\x1b[1mbefore\x1b[0m {visible(text)}|\n"
