"""The prompts that `anabranch verify` compares on: a built-in set of many lengths, or a file of the user's."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from anabranch.errors import ConfigError
from anabranch.system.files import read_regular

MAX_PROMPTS = 1000
MAX_FILE_BYTES = 64 << 20
_TEXTS = (
    "The capital of France is",
    "Grüße aus Zürich 🚲 — naïve café, 東京で会いましょう。\n\n```python\ndef fib(n: int) -> int:\n",
)
_PARAGRAPH = (
    "Entry {n}. A river of {n} bends leaves the hills, and at bend {m} a smaller stream parts from it, runs "
    "through the reeds for {m} miles, and joins the river again below the mill. "
)
_NUM_PARAGRAPHS = 28
_ID_LENGTHS = (1, 2, 63, 300)
_LONG_ID_LENGTH = 1200


@dataclass(frozen=True, kw_only=True)
class VerifyPrompt:
    """A prompt under a name for the report; `text` where it was given as text."""

    name: str
    token_ids: tuple[int, ...]
    text: str | None = None


class Encoder(Protocol):
    """What turns text into ids; raises LookupError where there is no tokenizer."""

    def encode(self, text: str) -> tuple[int, ...]: ...


def default_prompts(encoder: Encoder, vocab_size: int, max_prompt_tokens: int) -> list[VerifyPrompt]:
    """Texts where there is a tokenizer, and token ids drawn from a fixed seed; longer ones are cut to fit."""
    prompts: list[VerifyPrompt] = []
    lengths: tuple[int, ...] = _ID_LENGTHS
    long_text = "".join(_PARAGRAPH.format(n=n, m=n * 7 % 41) for n in range(1, _NUM_PARAGRAPHS + 1))
    try:
        for text in (*_TEXTS, long_text):
            ids = encoder.encode(text)
            fits = len(ids) <= max_prompt_tokens
            name = f"text of {min(len(ids), max_prompt_tokens)} tokens"
            prompts.append(VerifyPrompt(name=name, token_ids=ids[:max_prompt_tokens], text=text if fits else None))
    except LookupError:
        lengths = (*_ID_LENGTHS, _LONG_ID_LENGTH)
    for length in sorted({min(length, max_prompt_tokens) for length in lengths}):
        drawn = random.Random(length)
        ids = tuple(drawn.randrange(vocab_size) for _ in range(length))
        prompts.append(VerifyPrompt(name=f"{length} drawn token{'s' if length > 1 else ''}", token_ids=ids))
    return prompts


def read_prompts(path: Path, encoder: Encoder) -> list[VerifyPrompt]:
    """One prompt a line: plain text, or JSON: `"text"`, `[1, 2]`, `{"text": ...}` or `{"token_ids": [...]}`.

    Raises:
        ConfigError: the file cannot be read, is empty, or a line makes no prompt.
    """
    try:
        lines = read_regular(path, MAX_FILE_BYTES).decode().splitlines()
    except OSError as error:
        raise ConfigError("--prompts", str(path), f"cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise ConfigError("--prompts", str(path), "is not UTF-8 text; save it as UTF-8") from None
    prompts = [_parse_line(line, number, encoder) for number, line in enumerate(lines, start=1) if line.strip()]
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise ConfigError("--prompts", str(path), f"has {len(prompts)} prompts; give 1 to {MAX_PROMPTS}, one a line")
    return prompts


def _parse_line(line: str, number: int, encoder: Encoder) -> VerifyPrompt:
    content: object = line
    if line.lstrip()[:1] in ("{", "[", '"'):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = line  # a text that happens to begin like JSON
    if isinstance(content, dict):
        content = content.get("token_ids", content.get("text"))
    key = f"--prompts line {number}"
    name = f"line {number}"
    if isinstance(content, str):
        try:
            return VerifyPrompt(name=name, token_ids=encoder.encode(content), text=content)
        except LookupError as error:
            raise ConfigError(key, content[:40], str(error)) from None
    if isinstance(content, list) and content and all(type(item) is int for item in content):
        return VerifyPrompt(name=name, token_ids=tuple(content))
    raise ConfigError(key, line[:40], 'give text, or JSON such as {"text": "..."} or {"token_ids": [1, 2]}')
