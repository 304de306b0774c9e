"""Tokenizer files that hang, fill memory, read other files or run code: refused by name, or without effect."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from anabranch.errors import CheckpointError
from anabranch.model.sources import ModelSource
from anabranch.model.tokenizer import Tokenizer
from anabranch.model.tokenizer_files import MAX_SPECIAL_TOKENS
from tests.support.families import VOCAB, save_tokenizer

pytestmark = pytest.mark.unit

CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return tmp_path


def load(folder: Path) -> Tokenizer:
    return Tokenizer(ModelSource(name="it", path=folder, kind="folder"))


def edit(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def added(count: int) -> list[dict[str, object]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": VOCAB + n, "content": f"<{n}>", "special": True, **flags} for n in range(count)]


def test_the_tokens_of_a_checked_copy_are_the_same(folder) -> None:
    edit(folder, TOKENIZER, added_tokens=added(3))
    edit(folder, CONFIG, chat_template="{{ messages[0]['content'] }}")
    tokenizer = load(folder)
    assert tokenizer.encode("w7 w9<1>") == [7, 9, VOCAB + 1]
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (VOCAB + 3, (2,))
    assert tokenizer.render_chat([{"role": "user", "content": "w5"}]) == "w5"


def many(name: str, **changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, name, **changes)


TOO_MANY: dict[str, tuple[Callable[[Path], None], str]] = {
    "added_tokens": (many(TOKENIZER, added_tokens=[{}] * 400_000), r"tokenizer\.json: 400,000 added_tokens; at most"),
    "added_tokens_decoder": (
        many(CONFIG, added_tokens_decoder={str(n): {} for n in range(100_001)}),
        r"tokenizer_config\.json: 100,001 added_tokens_decoder",
    ),
    "added_tokens.json": (
        many("added_tokens.json", **{f"<{n}>": n for n in range(100_001)}),
        r"added_tokens\.json: 100,001 added tokens",
    ),
    "special tokens": (
        many(CONFIG, extra_special_tokens=[f"<{n}>" for n in range(MAX_SPECIAL_TOKENS + 1)]),
        r"tokenizer_config\.json: 4,097 extra_special_tokens",
    ),
    "special tokens map": (
        many("special_tokens_map.json", additional_special_tokens=[f"<{n}>" for n in range(MAX_SPECIAL_TOKENS + 1)]),
        r"special_tokens_map\.json: 4,097 additional_special_tokens",
    ),
    "special tokens by name": (
        many(CONFIG, **{f"x{n}_token": f"<{n}>" for n in range(MAX_SPECIAL_TOKENS + 1)}),
        r"tokenizer_config\.json: 4,\d+ keys",
    ),
    "values": (many(TOKENIZER, model=[[]] * 5_000_000), r"tokenizer\.json: about 10,\d+,\d+ values"),
    "a chat template": (many(CONFIG, chat_template="x" * (2 << 20)), "bytes of chat_template; at most 1,048,576"),
    "chat templates": (many(CONFIG, chat_template=[{"name": "default"}] * 50_000), "bytes of chat_template; at most"),
    "a replacement": (
        many(TOKENIZER, normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "x" * 100_000}),
        "100,000 characters of content; at most 64",
    ),
    "a prefix": (many(TOKENIZER, normalizer={"type": "Prepend", "prepend": "x" * 100}), "100 characters of prepend"),
    "a pattern": (
        many(TOKENIZER, pre_tokenizer={"type": "Split", "pattern": {"Regex": "a" * 50_000}}),
        "50,000 characters of Regex",
    ),
    "a post-processor's ids": (
        many(TOKENIZER, post_processor={"special_tokens": {"w1": {"ids": [1] * 5000}}}),
        "5,000 items of ids",
    ),
    "a section": (many(TOKENIZER, decoder={"x": [["y" * 1000] * 1000] * 3}), "bytes of decoder; at most 2,097,152"),
}


@pytest.mark.parametrize("case", TOO_MANY)
def test_counts_are_bounded(folder, case) -> None:
    damage, message = TOO_MANY[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("regex", ["(a+)+$", "([a-zA-Z]+)*$", "(a|aa)+$", r"(\s+)+$"])
@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
def test_a_regular_expression_that_goes_back_for_ever(folder, part, regex) -> None:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"Regex": regex}, "content": ""}
    edit(folder, TOKENIZER, **{part: split if part == "pre_tokenizer" else replace})
    with pytest.raises(CheckpointError, match=r"the tokenizer broke off at a text: .*retry-limit"):
        load(folder)


def test_one_that_only_a_prompt_finds_is_named_then(folder) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(q+)+$"}, "behavior": "Isolated", "invert": False}
    edit(folder, TOKENIZER, pre_tokenizer=split)
    tokenizer = load(folder)
    with pytest.raises(CheckpointError, match=r"the tokenizer broke off at a text: .*retry-limit"):
        tokenizer.encode("q" * 40 + "!")
    assert tokenizer.encode("w3") == [3]


@pytest.mark.parametrize("regex", ["(", "[", "a{99999999}", "(?<n>"])
def test_a_regular_expression_that_is_none(folder, regex) -> None:
    edit(folder, TOKENIZER, normalizer={"type": "Replace", "pattern": {"Regex": regex}, "content": ""})
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        TOKENIZER,
        CONFIG,
        "config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "tekken.json",
        "chat_template.jinja",
    ],
)
@pytest.mark.parametrize("kind", ["FIFO", "device", "sparse"])
def test_what_is_no_small_regular_file(folder, name, kind) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 30)
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read: it (is a|has more than)"):
        load(folder)


def test_special_files_under_other_names_are_not_opened(folder) -> None:
    """Under these, transformers' loaders would look too."""
    (folder / "additional_chat_templates").mkdir()
    for name in ("vocab.txt", "spiece.model", "additional_chat_templates/x.jinja", "chat_template.json", "x.tiktoken"):
        os.mkfifo(folder / name)
    assert load(folder).encode("w3") == [3]


@pytest.mark.parametrize("name", [TOKENIZER, CONFIG, "config.json", "special_tokens_map.json"])
def test_files_nested_too_deep(folder, name) -> None:
    (folder / name).write_text('{"x":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(CheckpointError, match=f"{name}: nested deeper than 64 levels"):
        load(folder)


def test_a_section_nested_too_deep(folder) -> None:
    path = folder / TOKENIZER
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder": "@"}).replace('"@"', "[" * 80 + "]" * 80))
    with pytest.raises(CheckpointError, match=f"{TOKENIZER}: nested deeper than 64 levels"):
        load(folder)


@pytest.mark.parametrize("auto_map", [["evil.T", "evil.T"], {"AutoTokenizer": ["evil.T", None]}, {"AutoTokenizer": 5}])
def test_code_of_the_folder_is_neither_run_nor_asked_about(folder, auto_map) -> None:
    (folder / "evil.py").write_text("raise SystemExit('run')")
    edit(folder, CONFIG, auto_map=auto_map, tokenizer_class="EvilTokenizer")
    edit(folder, "config.json", auto_map={"AutoConfig": "evil.C"}, num_labels=10**9)
    assert load(folder).encode("w3") == [3]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "AutoTokenizer", "Trainer", "a.b.Tokenizer", ["x"], "x" * 5000])
@pytest.mark.parametrize("file", [CONFIG, "config.json"])
def test_a_class_that_is_no_tokenizer(folder, file, name) -> None:
    edit(folder, file, tokenizer_class=name)
    with pytest.raises(CheckpointError, match=rf"{file}: tokenizer_class is .{{1,100}}; it must be the name of a"):
        load(folder)


def test_files_that_a_configuration_names_are_not_opened(folder) -> None:
    os.mkfifo(folder / "pipe")
    elsewhere = str(folder / "pipe")
    keys = (
        "vocab_file",
        "tokenizer_file",
        "merges_file",
        "gguf_file",
        "name_or_path",
        "vocab",
        "merges",
        "added_tokens_file",
    )
    edit(folder, CONFIG, fast_tokenizer_files=[elsewhere], init_inputs=[elsewhere], **dict.fromkeys(keys, elsewhere))
    assert load(folder).encode("w3") == [3]


@pytest.mark.parametrize(
    "changes",
    [
        {"added_tokens": 5},
        {"added_tokens": [5]},
        {"model": None},
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}},
        {"model": {"type": "Unigram", "vocab": [], "unk_id": 7}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": {"type": "Unknown"}},
    ],
)
def test_tokenizers_that_are_broken(folder, changes) -> None:
    edit(folder, TOKENIZER, **changes)
    with pytest.raises(CheckpointError):
        load(folder)


def test_padding_and_truncation_that_a_file_asks_for_are_not_done(folder) -> None:
    pad = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
    edit(folder, TOKENIZER, padding={**pad, "pad_id": 0, "pad_type_id": 0, "pad_token": "w0"})
    assert load(folder).encode("w3") == [3]
    cut = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    edit(folder, TOKENIZER, padding=None, truncation=cut)
    assert load(folder).encode("w3 w4 w5") == [3, 4, 5]


def test_nothing_is_left_of_the_copy(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with pytest.raises(CheckpointError, match="no temporary folder for the tokenizer of"):
        load(folder)
    (tmp_path / "tmp").mkdir()
    load(folder)
    assert os.listdir(tmp_path / "tmp") == []
