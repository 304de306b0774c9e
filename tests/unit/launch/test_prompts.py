from __future__ import annotations

from pathlib import Path

import pytest

from anabranch.errors import ConfigError
from launch.prompts import default_prompts, read_prompts

pytestmark = pytest.mark.unit


class Words:
    """A tokenizer of one id a word."""

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(len(word) for word in text.split())


class Nothing:
    def encode(self, text: str) -> tuple[int, ...]:
        raise LookupError("the model folder has no tokenizer; give prompts as token ids")


def test_the_default_set_has_one_token_and_a_long_one() -> None:
    prompts = default_prompts(Words(), 1000, 4000)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    assert min(lengths) == 1
    assert max(lengths) > 900
    assert any(prompt.text for prompt in prompts)
    assert prompts == default_prompts(Words(), 1000, 4000)


def test_the_default_set_fits_a_small_context_and_needs_no_tokenizer() -> None:
    prompts = default_prompts(Nothing(), 50, 100)
    assert [len(prompt.token_ids) for prompt in prompts] == [1, 2, 63, 100]
    assert all(0 <= token < 50 for prompt in prompts for token in prompt.token_ids)
    cut = default_prompts(Words(), 50, 100)
    assert all(len(prompt.token_ids) <= 100 for prompt in cut)


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text('one two\n\n{"text": "three"}\n{"token_ids": [4, 5]}\n[6]\n"seven"\n[not json\n')
    prompts = read_prompts(path, Words())
    assert [(p.name, p.text, p.token_ids) for p in prompts] == [
        ("line 1", "one two", (3, 3)),
        ("line 3", "three", (5,)),
        ("line 4", None, (4, 5)),
        ("line 5", None, (6,)),
        ("line 6", "seven", (5,)),
        ("line 7", "[not json", (4, 4)),
    ]


@pytest.mark.parametrize("line", ['{"txt": "a"}', "[]", "[1.5]", "[true]", '["a"]', "{}"])
def test_lines_that_make_no_prompt(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts"
    path.write_text(line)
    with pytest.raises(ConfigError, match="--prompts line 1"):
        read_prompts(path, Words())


def test_files_that_make_no_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_prompts(tmp_path / "absent", Words())
    path = tmp_path / "prompts"
    path.write_text("\n")
    with pytest.raises(ConfigError, match="has 0 prompts"):
        read_prompts(path, Words())
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_prompts(path, Words())
    path.write_text("text")
    with pytest.raises(ConfigError, match="no tokenizer"):
        read_prompts(path, Nothing())
