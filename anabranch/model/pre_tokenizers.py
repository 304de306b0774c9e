"""How the byte-level vocabularies of GGUF files cut text before they merge: by the name in `tokenizer.ggml.pre`.

A GGUF file carries vocabulary and merges, but of its pre-tokenizer the name alone. What each name stands for is
llama.cpp's to say (`src/llama-vocab.cpp`); where that notes the expression of the model's own tokenizer beside one of
its own, the model's stands here, since tokens must equal those that the model was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from anabranch.errors import UnsupportedArchitecture


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """What a name stands for.

    Attributes:
        splits: regular expressions; each cuts what the ones before it left whole into its matches and the rest.
        ignore_merges: a piece that is a token as a whole becomes that token, whatever the merges say.
        add_bos: whether prompts begin with BOS where the file does not say.
        nfc: whether text is brought into Unicode's normal form C first.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# An optional sign in front, then letters up to and including lower case ones; or capitals alone.
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SIGN = r"[^\r\n\p{L}\p{N}]?"


def _cased(ending: str = "") -> str:
    return rf"{_SIGN}{_CAPITALS}*{_SMALL}+{ending}|{_SIGN}{_CAPITALS}+{_SMALL}*{ending}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_SIGN}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTION}|{_SIGN}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35 = rf"{_CONTRACTION}|{_SIGN}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_SEED = rf"{_CONTRACTION}|{_SIGN}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_TEKKEN = rf"{_cased()}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = rf"{_cased(_CONTRACTION + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
# Letters that have a case, as the Unicode of its day knew them; escaped, since normal form C would change some.
_DEEPSEEK_WORD = (
    "\\s?[A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_DEEPSEEK_SIGN = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"""| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"""
)

_PLAIN = PreTokenizer(splits=(_GPT2,))
_DIGITS = PreTokenizer(splits=(r"\p{N}", _GPT2))
_LLAMA = PreTokenizer(splits=(_LLAMA3,))
_QWEN = PreTokenizer(splits=(_QWEN2,))
_O200K = PreTokenizer(splits=(_GPT4O,))
_DEEPSEEK = PreTokenizer(splits=(r"\p{N}{1,3}", _HAN_KANA, _DEEPSEEK3))


def _table() -> Iterator[tuple[str, PreTokenizer]]:
    def each(names: str, pre_tokenizer: PreTokenizer) -> Iterator[tuple[str, PreTokenizer]]:
        return ((name, pre_tokenizer) for name in names.split())

    llama3_names = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2"
    yield from each(llama3_names, replace(_LLAMA, ignore_merges=True, add_bos=True))
    yield from each("dbrx smaug-bpe glm4 chatglm-bpe", _LLAMA)
    yield "tekken", PreTokenizer(splits=(_TEKKEN,), ignore_merges=True, add_bos=True)
    # transformers' own tokenizer of these two normalizes.
    yield "qwen2", replace(_QWEN, nfc=True)
    yield "qwen35", PreTokenizer(splits=(_QWEN35,), nfc=True)
    yield from each("deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", _QWEN)
    yield from each("gpt-4o llama4 kanana2 talkie minimax-m2", _O200K)
    yield "seed-coder", PreTokenizer(splits=(_SEED,))
    yield from each("gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum", _PLAIN)
    yield from each("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", _DIGITS)
    yield "falcon", PreTokenizer(splits=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))
    yield "default", PreTokenizer(splits=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
    yield (
        "deepseek-llm",
        PreTokenizer(splits=(r"[\r\n]", _DEEPSEEK_WORD, _DEEPSEEK_SIGN, r"\s+$", _EAST_ASIAN, r"\p{N}+")),
    )
    yield "deepseek-coder", PreTokenizer(splits=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}"))
    yield from each("deepseek-v3 hunyuan-dense joyai-llm", _DEEPSEEK)


PRE_TOKENIZERS = dict(_table())


def pre_tokenizer(name: str) -> PreTokenizer:
    """What `tokenizer.ggml.pre` names. Raises UnsupportedArchitecture with the names that are known."""
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    found = f"{name!r} is not supported" if name else "is missing; convert the model again with a newer llama.cpp"
    raise UnsupportedArchitecture(f"tokenizer.ggml.pre: {found}; supported are {', '.join(PRE_TOKENIZERS)}")
