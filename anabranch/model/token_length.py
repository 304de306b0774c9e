"""How much text one token can stand for, which bounds the text that a context can hold before any is tokenised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Unicode's composed forms have at least a quarter of the characters of what they are composed from (UAX 15).
_MAX_COMPOSED = 4
# The parts of a tokenizer that never drop a character.
_SAFE_PRE_TOKENIZERS = frozenset({"ByteLevel", "Digits", "Metaspace", "UnicodeScripts"})
_SAFE_NORMALIZERS = frozenset({"NFC", "Prepend", "Replace"})


def longest_token_chars(tokenizer: Mapping[str, Any]) -> int | None:
    """Most characters of a text that one token stands for.

    Args:
        tokenizer: the content of a `tokenizer.json`.

    Returns:
        A bound that holds for every text; None where there is none or none is known: a token for unknown words of
        any length, white space that is dropped or collapsed.
    """
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or (
        model.get("fuse_unk") and model.get("unk_token") and not model.get("byte_fallback")
    ):
        return None
    normalizers = list(_parts(tokenizer.get("normalizer"), "normalizers"))
    if not all(part["type"] in _SAFE_NORMALIZERS and _keeps(part) for part in normalizers):
        return None
    if not all(_cuts_only(part) for part in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")):
        return None
    added = tokenizer.get("added_tokens") or []
    if any(token.get("lstrip") or token.get("rstrip") for token in added):
        return None
    # A token of bytes has at least as many bytes as characters, and is written with a letter for each byte.
    longest = max(map(len, (*(model.get("vocab") or {"": 0}), *(token["content"] for token in added))))
    return max(1, longest) * (_MAX_COMPOSED if any(part["type"] == "NFC" for part in normalizers) else 1)


def _parts(part: Mapping[str, Any] | None, key: str) -> Iterable[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of them."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part[key]:
            yield from _parts(inner, key)
    else:
        yield part


def _keeps(normalizer: Mapping[str, Any]) -> bool:
    """Whether a step leaves at least as many characters as it finds."""
    if normalizer["type"] != "Replace":
        return True
    pattern = normalizer["pattern"].get("String")
    return pattern is not None and len(pattern) <= len(normalizer["content"])


def _cuts_only(pre_tokenizer: Mapping[str, Any]) -> bool:
    """Whether a step keeps all characters."""
    if pre_tokenizer["type"] == "Split":
        return bool(pre_tokenizer["behavior"] != "Removed")
    return pre_tokenizer["type"] in _SAFE_PRE_TOKENIZERS
