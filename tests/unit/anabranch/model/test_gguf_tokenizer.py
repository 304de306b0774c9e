"""GGUF tokenizers: built from the file alone, with its pre-tokenizer, special tokens and template."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from gguf import GGUFWriter, TokenType

from anabranch.errors import CheckpointError, ModelError, UnsupportedArchitecture
from anabranch.model.sources import resolve_model
from anabranch.model.tokenizer import Tokenizer
from tests.support.families import save_tokenizer
from tests.support.gguf import write_vocabulary

pytestmark = pytest.mark.unit

BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
# G with a dot stands for a space, C with a dot for a newline.
MERGES = ["\u0120 t", "\u010a \u010a", "h e", "\u0120t he", "1 2", "12 3"]
WORDS = [*BYTES, *(merge.replace(" ", "") for merge in MERGES)]
SPECIAL = ["<s>", "</s>", "<|user|>", "<think>"]
TOKENS = [*WORDS, *SPECIAL]
KINDS = {"<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL, "<|user|>": TokenType.CONTROL}
IDS = {"bos": TOKENS.index("<s>"), "eos": TOKENS.index("</s>")}
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}</s>{% endfor %}"

Write = Callable[..., Tokenizer]


@pytest.fixture
def write(tmp_path) -> Write:
    """`write(tokens, **vocabulary) -> Tokenizer` of a file with these tokens; see `write_vocabulary`."""

    def run(tokens: list[str] = TOKENS, *, num_rows: int | None = None, **vocabulary: object) -> Tokenizer:
        path = tmp_path / "tiny.gguf"
        writer = GGUFWriter(path, "llama")
        if tokens:
            write_vocabulary(writer, tokens, **vocabulary)  # type: ignore[arg-type]
        rows = len(tokens) if num_rows is None else num_rows
        writer.add_tensor("token_embd.weight", np.zeros((rows, 4), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Tokenizer(resolve_model(str(path)))

    return run


def byte_level(**changes: object) -> dict[str, object]:
    return {"merges": MERGES, "kinds": KINDS, "ids": IDS, **changes}


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    return [TOKENS[token] for token in tokenizer.encode(text)]


def test_the_named_pre_tokenizer_cuts_before_merges(write) -> None:
    """A digit after a blank line: as a word of its own, or as what the line's end is not the end of."""
    text = "the\n\n123"
    assert words(write(**byte_level(pre="smollm")), text) == ["t", "he", "\u010a\u010a", "1", "2", "3"]
    assert words(write(**byte_level(pre="gpt-2")), text) == ["t", "he", "\u010a", "\u010a", "123"]
    assert words(write(**byte_level(pre="qwen2")), text) == ["t", "he", "\u010a\u010a", "1", "2", "3"]
    assert words(write(**byte_level(pre="deepseek-llm")), text) == ["t", "he", "\u010a", "\u010a", "123"]


def test_a_whole_piece_is_its_token_where_merges_are_ignored(write) -> None:
    merges = [merge for merge in MERGES if merge != "12 3"]
    assert words(write(**byte_level(pre="llama-bpe", merges=merges)), "123") == ["<s>", "123"]
    assert words(write(**byte_level(pre="dbrx", merges=merges)), "123") == ["12", "3"]


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("llama-bpe", {}, ["<s>", "h"]),
        ("tekken", {}, ["<s>", "h"]),
        ("llama-bpe", {"add_bos_token": False}, ["h"]),
        ("qwen2", {}, ["h"]),
        ("smollm", {"add_bos_token": True}, ["<s>", "h"]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, ["<s>", "h", "</s>"]),
        ("gpt-2", {"add_eos_token": True}, ["h", "</s>"]),
    ],
)
def test_what_goes_around_a_prompt(write, pre, flags, expected) -> None:
    tokenizer = write(**byte_level(pre=pre, flags=flags))
    assert words(tokenizer, "h") == expected
    assert tokenizer.encode("h", add_special_tokens=False) == [TOKENS.index("h")]


def test_special_tokens_are_found_whole_and_text_comes_back(write) -> None:
    tokenizer = write(**byte_level(pre="smollm", kinds={**KINDS, "<think>": TokenType.USER_DEFINED}))
    text = "<|user|>the<think> caf\u00e9\u2028\u4e2d\n"
    found = words(tokenizer, text)
    assert found[:4] == ["<|user|>", "t", "he", "<think>"]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text.removeprefix("<|user|>")
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (len(TOKENS), (IDS["eos"],))


def test_qwen_brings_text_into_normal_form(write) -> None:
    composed, apart = "caf\u00e9", "cafe\u0301"
    qwen, plain = write(**byte_level(pre="qwen2")), write(**byte_level(pre="gpt-2"))
    assert qwen.encode(apart) == qwen.encode(composed)
    assert plain.encode(apart) != plain.encode(composed)


def test_a_file_in_another_models_folder_keeps_its_own(write, tmp_path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("another's")
    transformers.LlamaConfig(vocab_size=7).save_pretrained(tmp_path)
    tokenizer = write(**byte_level(pre="smollm", chat_template=TEMPLATE))
    assert words(tokenizer, "the") == ["t", "he"]
    text = tokenizer.render_chat([{"role": "user", "content": "the"}])
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [TOKENS[token] for token in ids] == ["<|user|>", "t", "he", "</s>"]
    assert not write(**byte_level(pre="smollm")).has_chat_template


@pytest.mark.parametrize("kind", [TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.NORMAL])
def test_all_ends_of_turns_in_the_vocabulary_end_an_answer(write, kind) -> None:
    tokens = [*TOKENS, "<|eot_id|>", "<|end_of_text|>", "<|im_end|>"]
    kinds = {**KINDS, "<|eot_id|>": kind, "<|im_end|>": kind}
    end_of_text = tokens.index("<|end_of_text|>")
    tokenizer = write(tokens, **byte_level(pre="llama-bpe", kinds=kinds, ids={**IDS, "eos": end_of_text}))
    # Whatever kind the file says that they are, and the plain </s> of other models among them.
    assert set(tokenizer.eos_token_ids) == {tokens.index("</s>"), *range(len(TOKENS), len(tokens))}
    assert tokenizer.eos_token_ids[0] == end_of_text
    assert tokenizer.encode("<|eot_id|>", add_special_tokens=False) == [tokens.index("<|eot_id|>")]


def test_what_is_saved_is_read_back_the_same(write, tmp_path) -> None:
    tokenizer = write(**byte_level(pre="llama-bpe", chat_template=TEMPLATE))
    folder = tmp_path / "saved"
    tokenizer.save(folder)
    transformers.LlamaConfig(vocab_size=len(TOKENS)).save_pretrained(folder)
    again = Tokenizer(resolve_model(str(folder)))
    for text in ("the\n\n123", " the  12<|user|>", "It'S  \t1"):
        assert again.encode(text) == tokenizer.encode(text)
    assert again.render_chat([{"role": "user", "content": "x"}]) == tokenizer.render_chat(
        [{"role": "user", "content": "x"}]
    )


# Sentencepiece -----------------------------------------------------------------------------------------------

PIECES = ["\u2581", "a", "b", "ab", "\u2581a", "aba", "\u2581ab", "bb", "abab", "b\u2581"]
SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *PIECES]
SPM_KINDS = {
    "<unk>": TokenType.UNKNOWN,
    "<s>": TokenType.CONTROL,
    "</s>": TokenType.CONTROL,
    **{f"<0x{value:02X}>": TokenType.BYTE for value in range(256)},
}
SPM_SCORES = [0.0] * 259 + [-float((7 * place) % len(PIECES)) for place in range(len(PIECES))]


def by_score(text: str) -> list[str]:
    """llama.cpp's way: the pair whose token scores best merges first, the leftmost of equals."""
    score = dict(zip(SPM_TOKENS, SPM_SCORES, strict=True))
    pieces = list(text)
    while True:
        pairs = [(-score[a + b], place) for place, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in score]
        if not pairs:
            break
        place = min(pairs)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    known: list[str] = []
    for piece in pieces:
        known += [piece] if piece in score else [f"<0x{value:02X}>" for value in piece.encode()]
    return known


def spm(**changes: object) -> dict[str, object]:
    return {"model": "llama", "pre": "default", "scores": SPM_SCORES, "kinds": SPM_KINDS, **changes}


def test_sentencepiece_merges_by_score(write) -> None:
    tokenizer = write(SPM_TOKENS, **spm())
    rng = random.Random(3)
    for _ in range(300):
        text = "".join(rng.choices("aaabbb c\u00e9", k=rng.randrange(1, 14)))
        found = [SPM_TOKENS[token] for token in tokenizer.encode(text)]
        whole = text.replace(" ", "\u2581")
        # A text that begins with a space gets no second one.
        assert found == ["<s>", *by_score(whole if whole.startswith("\u2581") else "\u2581" + whole)], text
        if not text.startswith(" "):
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ["<s>", "\u2581ab"]),
        ({"add_bos_token": False}, ["\u2581ab"]),
        ({"add_space_prefix": False}, ["<s>", "ab"]),
        ({"add_eos_token": True, "add_space_prefix": False}, ["<s>", "ab", "</s>"]),
    ],
)
def test_what_sentencepiece_puts_around_a_prompt(write, flags, expected) -> None:
    scores = [0.0] * 259 + [-float(place) for place in range(len(PIECES))]
    tokenizer = write(SPM_TOKENS, **spm(flags=flags, scores=scores))
    assert [SPM_TOKENS[token] for token in tokenizer.encode("ab")] == expected
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
    assert tokenizer.eos_token_ids == (2,)


TOO_LONG = [f"{number:06d}" + "x" * 1018 for number in range(16_400)]
EVERY_CUT = [letter * length for letter in "cdefg" for length in range(1, 1000)]


# What is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"pre": "gpt-17"}, UnsupportedArchitecture, r"tokenizer\.ggml\.pre: 'gpt-17' is not supported; .*smollm"),
        ({"pre": ""}, UnsupportedArchitecture, r"tokenizer\.ggml\.pre: is missing"),
        ({"model": "bert"}, UnsupportedArchitecture, r"tokenizer\.ggml\.model: 'bert' is not supported; gpt2"),
        ({"merges": ()}, CheckpointError, r"tokenizer\.ggml\.merges is missing"),
        ({"merges": ["h x\u4e2d"]}, CheckpointError, "the tokenizer cannot be loaded"),
        ({"ids": {"eos": 9999}}, CheckpointError, r"tokenizer\.ggml\.eos_token_id: 9999 is not among"),
        ({"pre": "llama-bpe", "ids": {}}, CheckpointError, r"tokenizer\.ggml\.bos_token_id is missing"),
        ({"tokens": [*TOKENS, "he"]}, CheckpointError, r"tokenizer\.ggml\.tokens: 'he' is there more than once"),
        ({"num_rows": 5}, CheckpointError, r"tokenizer\.ggml\.tokens: \d+ for an embedding of 5"),
        ({"tokens": SPM_TOKENS, **spm(scores=())}, CheckpointError, r"tokenizer\.ggml\.scores: 0 for 269 tokens"),
        (
            {"tokens": [*SPM_TOKENS, "c" * 1025], **spm(scores=[0.0] * 270)},
            CheckpointError,
            r"tokenizer\.ggml\.tokens: one of 1,025 characters, and no merges; at most 1,024",
        ),
        (
            {"tokens": [*SPM_TOKENS, *TOO_LONG], **spm(scores=[0.0] * (269 + len(TOO_LONG)))},
            CheckpointError,
            r"tokenizer\.ggml\.tokens: all of 16,\d+,\d+ characters, and no merges; at most 16,777,216",
        ),
        # Every cut of every one gives two others.
        (
            {"tokens": [*SPM_TOKENS, *EVERY_CUT], **spm(scores=[0.0] * (269 + len(EVERY_CUT)))},
            CheckpointError,
            r"tokenizer\.ggml\.tokens: more than 2,000,000 ways to put one together",
        ),
        ({"tokens": [], "num_rows": 5}, CheckpointError, r"tokenizer\.ggml\.model is missing: the file brings no"),
    ],
)
def test_what_cannot_be_a_tokenizer_is_refused_by_name(write, changes, kind, message) -> None:
    vocabulary = {**byte_level(), **changes}
    if vocabulary.get("model") == "llama":
        del vocabulary["merges"], vocabulary["ids"]
    tokens = vocabulary.pop("tokens", TOKENS)
    with pytest.raises(ModelError, match=message) as raised:
        write(tokens, **vocabulary)
    assert type(raised.value) is kind


def test_padding_that_no_token_stands_for_is_no_matter(write) -> None:
    assert write(**byte_level(ids={**IDS, "padding": 9999, "unknown": 9999})).vocab_size == len(TOKENS)


def test_a_tokenizer_needs_nothing_beside_its_file(write, tmp_path: Path) -> None:
    write(**byte_level())
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
