"""The bound on what one token stands for: it holds for every text, or there is none."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from anabranch.model.token_length import longest_token_chars

pytestmark = pytest.mark.unit

CORPUS = ["hello world " * 20, "    deep    indent" * 20, "ééé ΐΐ 日本語" * 20, "-" * 64]


def byte_level(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Bytes with merges, as GPT-2 and most models since."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+|\w+|[^\s\w]+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    made.train_from_iterator(CORPUS, trainer)
    if normalizer is not None:
        made.normalizer = normalizer
    return made


def sentence_pieces() -> Tokenizer:
    """Pieces with bytes for unknown characters, as Llama 2."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}, "▁": 257, "a": 258, "▁a": 259}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def bound(tokenizer: Tokenizer) -> int | None:
    return longest_token_chars(json.loads(tokenizer.to_str()))


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "composed bytes": lambda: byte_level(normalizers.NFC()),
    "pieces": sentence_pieces,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_no_text_needs_fewer_tokens_than_the_bound_says(kind: str) -> None:
    tokenizer = MAKERS[kind]()
    longest = bound(tokenizer)
    assert longest is not None
    worst = st.sampled_from(
        ["-" * 64, "<|end|>", "    ", " ", "a", "\u03b9\u0308\u0301", "e\u0301", "日", "🙂", "\u1fbf"]
    )

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.one_of(worst, st.characters(codec="utf-8")), min_size=1, max_size=40).map("".join))
    def check(text: str) -> None:
        assert len(text) <= longest * len(tokenizer.encode(text, add_special_tokens=False).ids)

    check()


def test_the_bound_is_the_longest_token() -> None:
    assert bound(byte_level()) == max(map(len, byte_level().get_vocab()))
    added = byte_level()
    added.add_tokens(["y" * 500])
    assert bound(added) == 500
    assert bound(byte_level(normalizers.NFC())) == 4 * bound(byte_level())


def stripping() -> Tokenizer:
    made = byte_level()
    made.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return made


def whitespace() -> Tokenizer:
    made = byte_level()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def fused() -> Tokenizer:
    return Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>", fuse_unk=True))


def removing() -> Tokenizer:
    made = byte_level()
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return made


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")), "z" * 10_000),
        (fused, "z" * 10_000),
        (whitespace, " " * 10_000 + "a"),
        (removing, " " * 10_000 + "a"),
        (stripping, " " * 10_000 + "<mask>"),
        (lambda: byte_level(normalizers.Strip()), " " * 10_000 + "a"),
        (lambda: byte_level(normalizers.Replace(Regex(" +"), " ")), " " * 10_000),
        (lambda: byte_level(normalizers.Replace("  ", "")), " " * 10_001),
    ],
    ids=["unknown words", "fused", "white space", "removing", "stripping token", "strip", "collapse", "replace"],
)
def test_where_a_token_may_stand_for_any_length_there_is_no_bound(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    assert len(tokenizer.encode(text).ids) <= 4, "the case shows nothing"
    assert bound(tokenizer) is None
