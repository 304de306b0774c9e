"""A folder's tokenizer files, checked one by one and copied to where transformers finds nothing else.

transformers opens whatever a folder holds under some twenty names, and more that these files name themselves. So it
is shown a private folder with the files that were looked at: regular, bounded in bytes, values, depth and in what
they make the tokenizer do.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from anabranch.errors import CheckpointError
from anabranch.model.config_bounds import checked_fields
from anabranch.model.json_files import MAX_DEPTH, parse_json_object, read_bounded

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
MODEL_CONFIG_NAME = "config.json"
# Vocabulary and merges of the largest tokenizers: 40 MB, 2 million values.
MAX_FILE_BYTES = 128 << 20
MAX_FILE_VALUES = 4_000_000
MAX_TEMPLATE_BYTES = 1 << 20
# Speech models over Llama and Qwen add up to 65,536 tokens; loading takes transformers 65 us for each.
MAX_ADDED_TOKENS = 100_000
# transformers compares each of these with all others. The longest real list has some 1,600.
MAX_SPECIAL_TOKENS = 4096
# Normalizer, pre-tokenizer, post-processor or decoder; the largest hold a table of characters of 0.4 MB.
MAX_SECTION_BYTES = 2 << 20
MAX_SECTION_TEXT = 16_384
MAX_SECTION_ITEMS = 1024
# What one character may be replaced by.
MAX_REPLACEMENT = 64

_JSON_NAMES = (
    MODEL_CONFIG_NAME,
    CONFIG_NAME,
    TOKENIZER_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "tekken.json",
)
_OTHER_NAMES = {
    "merges.txt": MAX_FILE_BYTES,
    "tokenizer.model": MAX_FILE_BYTES,
    "tiktoken.model": MAX_FILE_BYTES,
    "chat_template.jinja": MAX_TEMPLATE_BYTES,
}
# What transformers would take from tokenizer_config.json and open, run or call.
_NOT_TAKEN = re.compile(r"auto_map|init_inputs|name_or_path|vocab|merges|tokenizer_object|backend|_.*|.*_files?")
_CLASS = re.compile(r"(?!Auto)\w{0,64}(Tokenizer|TokenizerFast|Backend)")
# Of config.json, what decides on a tokenizer.
_MODEL_CONFIG_KEYS = ("architectures", "model_type", "transformers_version", "tokenizer_class")


class _TokenizerFile(msgspec.Struct):
    """tokenizer.json; what is `Raw` is skipped over, not parsed."""

    added_tokens: list[msgspec.Raw] = []
    normalizer: msgspec.Raw = msgspec.Raw(b"null")
    pre_tokenizer: msgspec.Raw = msgspec.Raw(b"null")
    post_processor: msgspec.Raw = msgspec.Raw(b"null")
    decoder: msgspec.Raw = msgspec.Raw(b"null")


@contextmanager
def checked_tokenizer(folder: Path) -> Iterator[Path]:
    """A private folder with checked copies of `folder`'s tokenizer files; it lives as long as the context.

    Raises:
        CheckpointError: names the file, and the key or section where there is one.
    """
    try:
        private = tempfile.TemporaryDirectory(prefix="anabranch-tokenizer-")
    except OSError as error:
        raise CheckpointError(f"no temporary folder for the tokenizer of {folder}: {error}") from error
    with private as name:
        copy = Path(name)
        for file, data in _checked_files(folder):
            (copy / file).write_bytes(data)
        yield copy


def _checked_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file that is there."""
    for name, max_bytes in _OTHER_NAMES.items():
        if (folder / name).exists():
            yield name, read_bounded(folder / name, max_bytes=max_bytes)
    for name in _JSON_NAMES:
        path = folder / name
        if not path.exists():
            continue
        data = read_bounded(path, max_bytes=MAX_FILE_BYTES, max_values=MAX_FILE_VALUES)
        if name == TOKENIZER_NAME:
            _check_tokenizer(path, data)
            yield name, data
            continue
        content = parse_json_object(path, data)
        if name == MODEL_CONFIG_NAME:
            data = _taken(path, {key: content[key] for key in _MODEL_CONFIG_KEYS if key in content})
        elif name == CONFIG_NAME:
            _check_config(path, content)
            data = _taken(path, {key: value for key, value in content.items() if not _NOT_TAKEN.fullmatch(key)})
        elif name == "added_tokens.json":
            _check_count(path, "added tokens", len(content), MAX_ADDED_TOKENS)
        elif name == "special_tokens_map.json":
            _check_special_tokens(path, content)
        yield name, data


def _taken(path: Path, content: dict[str, object]) -> bytes:
    """What is left of a configuration, once its texts are checked."""
    checked_fields(str(path), content)
    # transformers calls `from_pretrained` of whichever of its classes is named here.
    name = content.get("tokenizer_class")
    if name is not None and not (isinstance(name, str) and _CLASS.fullmatch(name)):
        raise CheckpointError(f"{path}: tokenizer_class is {str(name)[:80]!r}; it must be the name of a tokenizer")
    return json.dumps(content).encode()


def _check_config(path: Path, content: dict[str, object]) -> None:
    _check_special_tokens(path, content)
    added = content.get("added_tokens_decoder")
    if isinstance(added, dict | list):
        _check_count(path, "added_tokens_decoder", len(added), MAX_ADDED_TOKENS)
    template = content.get("chat_template")
    _check_count(path, "bytes of chat_template", len(json.dumps(template)), MAX_TEMPLATE_BYTES)


def _check_special_tokens(path: Path, content: dict[str, object]) -> None:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = content.get(key)
        if isinstance(tokens, dict | list):
            _check_count(path, key, len(tokens), MAX_SPECIAL_TOKENS)
    _check_count(path, "keys", len(content), MAX_SPECIAL_TOKENS)


def _check_tokenizer(path: Path, data: bytes) -> None:
    try:
        content = msgspec.json.decode(data, type=_TokenizerFile)
    except RecursionError:
        raise CheckpointError(f"{path}: nested deeper than {MAX_DEPTH} levels") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise CheckpointError(f"{path}: not a tokenizer: {error}") from error
    _check_count(path, "added_tokens", len(content.added_tokens), MAX_ADDED_TOKENS)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        section = bytes(getattr(content, name))
        _check_count(path, f"bytes of {name}", len(section), MAX_SECTION_BYTES)
        _check_section(path, name, parse_json_object(path, b'{"%s":%s}' % (name.encode(), section)))


def _check_section(path: Path, key: str, value: object) -> None:
    """What a section does to a text must stay in proportion to the text."""
    if isinstance(value, dict | list):
        _check_count(path, f"items of {key}", len(value), MAX_SECTION_ITEMS)
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_section(path, str(name) if isinstance(value, dict) else key, inner)
    elif isinstance(value, str) and key != "precompiled_charsmap":
        most = MAX_REPLACEMENT if key in ("content", "prepend") else MAX_SECTION_TEXT
        _check_count(path, f"characters of {key}", len(value), most)


def _check_count(path: Path, what: str, count: int, most: int) -> None:
    if count > most:
        raise CheckpointError(f"{path}: {count:,} {what}; at most {most:,} are read")
