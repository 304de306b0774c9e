"""Somebody else's words on a terminal: a model's answer, a topology's strings, a child's log."""

from __future__ import annotations

from rich.markup import escape

# Characters that a terminal obeys: C0 and C1 without newline and tab, and DEL.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    """Text in which control characters are shown, so that no escape sequence of others reaches the terminal."""
    return text.translate(_CONTROLS)


def said(text: object) -> str:
    """Somebody else's text for a console: neither its control characters nor its brackets mean anything."""
    return escape(visible(str(text)))
