"""Texts are cut as by the expressions that llama.cpp documents for each name (src/llama-vocab.cpp)."""

from __future__ import annotations

import random

import pytest
import regex
from tokenizers import Regex, pre_tokenizers

from anabranch.errors import UnsupportedArchitecture
from anabranch.model.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer

pytestmark = pytest.mark.unit

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
LLAMA3 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
HAN = "\u4e00-\u9fa5"
EAST_ASIAN = f"[{HAN}\u0800-\u4e00\uac00-\ud7ff]+"
# llama.cpp spells out those of the Unicode of its day; the characters below are among them.
CASED = r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"
FULL_WIDTH = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"

DOCUMENTED = {
    "smollm": (r"\p{N}", GPT2),
    "starcoder": (r"\p{N}", GPT2),
    "command-r": (r"\p{N}", GPT2),
    "gpt-2": (GPT2,),
    "olmo": (GPT2,),
    "llama-bpe": (LLAMA3,),
    "chatglm-bpe": (LLAMA3,),
    "qwen2": (QWEN2,),
    "deepseek-r1-qwen": (QWEN2,),
    "tekken": (TEKKEN,),
    "gpt-4o": (GPT4O,),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "deepseek-llm": (r"[\r\n]", CASED, r"\s?" + FULL_WIDTH, r"\s+$", EAST_ASIAN, r"\p{N}+"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", EAST_ASIAN, r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", f"[{HAN}\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK3),
    "seed-coder": (
        CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
WRITTEN = [
    "a\n\n2",
    "Steps:\n\n1. one\n\n2. two\n",
    "x =  5",
    "\t12\t\t345",
    "it's IT'S we'll WE'LL he'd",
    "  leading and trailing  ",
    "\r\n\r\n  \n x\n  ",
    "1234567 89 ½ ²",
    "Größe 中文字, 한국어 かな кот ΑΒΓαβγ!",
    "a.b(c)[d] $5 + 6 = <tag> `code` ^~|",
    "camelCaseWORD CamelCase's/path//to",
    "e\u0301 \u0928\u092e\u0938\u094d\u0924\u0947",
    "",
]
ALPHABET = [*"aZbQ'stLlre", *"0129", *"  \n\n\t\r", *".,!?-/$=`|", "é", "ß", "中", "か", "한", "я", "Σ", "½", "\u0301"]


def cut(text: str, expressions: tuple[str, ...]) -> list[str]:
    """Each expression cuts what those before it left; what it does not match stays as it is."""
    pieces = [text] if text else []
    for expression in expressions:
        cut_now: list[str] = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(expression, piece):
                cut_now += [piece[end : match.start()], match.group()]
                end = match.end()
            cut_now.append(piece[end:])
        pieces = [piece for piece in cut_now if piece]
    return pieces


def cut_here(text: str, splits: tuple[str, ...]) -> list[str]:
    steps = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated") for split in splits])
    return [piece for piece, _ in steps.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_texts_are_cut_as_documented(name: str) -> None:
    rng = random.Random(name)
    drawn = ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 24))) for _ in range(400)]
    for text in WRITTEN + drawn:
        assert cut_here(text, pre_tokenizer(name).splits) == cut(text, DOCUMENTED[name]), (name, text)


def test_every_name_cuts_whole_texts() -> None:
    for name, known in PRE_TOKENIZERS.items():
        for text in WRITTEN:
            assert "".join(cut_here(text, known.splits)) == text, name


def test_the_flags_are_llama_cpps() -> None:
    merges_ignored = {name for name, known in PRE_TOKENIZERS.items() if known.ignore_merges}
    assert {"llama-bpe", "llama3", "tekken"} <= merges_ignored
    assert merges_ignored == {name for name, known in PRE_TOKENIZERS.items() if known.add_bos}
    assert not merges_ignored & {"smollm", "gpt-2", "qwen2", "deepseek-llm", "dbrx"}


@pytest.mark.parametrize("name", ["gpt-17", "viking", "SMOLLM"])
def test_an_unknown_name_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=rf"tokenizer\.ggml\.pre: '{name}' is not supported.*smollm"):
        pre_tokenizer(name)


def test_no_name_says_what_to_do() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"tokenizer\.ggml\.pre: is missing; convert the model again"):
        pre_tokenizer("")
