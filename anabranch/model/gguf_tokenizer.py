"""The tokenizer that a GGUF file describes, built from its metadata alone, whatever else lies in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from anabranch.errors import CheckpointError, UnsupportedArchitecture
from anabranch.model.end_of_turn import END_OF_TURN
from anabranch.model.gguf_weights import GgufFile
from anabranch.model.pre_tokenizers import pre_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Values of tokenizer.ggml.token_type.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "\u2581"
_KEY = "tokenizer.ggml."
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# What a sentencepiece vocabulary's special tokens are where the file does not say.
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
# Of a vocabulary without merges, which are then looked for at every cut of every token: at a cost of its length each.
MAX_PIECE_CHARS = 1024
MAX_PIECES_CHARS = 16 << 20
# The largest vocabularies have 0.6 million.
MAX_MERGES = 2_000_000


def read_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Build a GGUF file's tokenizer, its chat template included.

    Raises:
        CheckpointError: the file brings no tokenizer, or one that contradicts itself.
        UnsupportedArchitecture: a kind of vocabulary or a pre-tokenizer that is not known, by name.
    """
    with GgufFile(path) as file:
        return _GgufTokenizer(file).build()


class _GgufTokenizer:
    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._kind = file.text(f"{_KEY}model")
        if not self._kind:
            raise CheckpointError(f"{file.path}: {_KEY}model is missing: the file brings no tokenizer")
        if self._kind not in ("gpt2", "llama"):
            raise UnsupportedArchitecture(
                f"{file.path}: {_KEY}model: {self._kind!r} is not supported; gpt2 (byte-level BPE) and llama "
                "(sentencepiece) are"
            )
        self._tokens = [text or f"[EMPTY_{number}]" for number, text in enumerate(file.texts(f"{_KEY}tokens"))]
        self._vocab = {text: number for number, text in enumerate(self._tokens)}
        num_rows = file.shape("model.embed_tokens.weight")[0]
        if not 0 < len(self._tokens) <= num_rows:
            raise CheckpointError(f"{file.path}: {_KEY}tokens: {len(self._tokens)} for an embedding of {num_rows}")
        if len(self._vocab) < len(self._tokens):
            twice = next(text for number, text in enumerate(self._tokens) if self._vocab[text] != number)
            raise CheckpointError(f"{file.path}: {_KEY}tokens: {twice!r} is there more than once")

    def build(self) -> PreTrainedTokenizerBase:
        from transformers import PreTrainedTokenizerFast

        add_bos = self._kind == "llama"
        if self._kind == "gpt2":
            cut = pre_tokenizer(self._file.text(f"{_KEY}pre"))
            add_bos = cut.add_bos
            model = models.BPE(vocab=self._vocab, merges=self._stored_merges(), ignore_merges=cut.ignore_merges)
            tokenizer = Tokenizer(model)
            if cut.nfc:
                tokenizer.normalizer = normalizers.NFC()
            splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in cut.splits]
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            )
            tokenizer.decoder = decoders.ByteLevel()
        else:
            tokenizer = self._sentencepiece()
        self._add_whole_tokens(tokenizer)
        named = {name: self._tokens[token] for name, key in _NAMED.items() if (token := self._id(key)) is not None}
        tokenizer.post_processor = self._around(add_bos)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=self._file.text("tokenizer.chat_template") or None,
            clean_up_tokenization_spaces=False,
            **named,
        )

    def _sentencepiece(self) -> Tokenizer:
        """Pairs merge by their token's score; what is no token becomes bytes."""
        merges = self._stored_merges() or self._merges_by_score()
        tokenizer = Tokenizer(models.BPE(vocab=self._vocab, merges=merges, fuse_unk=True, byte_fallback=True))
        add_prefix = self._file.flag(f"{_KEY}add_space_prefix", True)
        scheme = "first" if add_prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_prefix else steps)
        return tokenizer

    def _stored_merges(self) -> list[tuple[str, str]]:
        """The merges in the file, best first; none is an error where the vocabulary has no scores instead."""
        merges = []
        for text in self._file.texts(f"{_KEY}merges"):
            left, _, right = text.partition(" ")
            merges.append((left, right))
        if not merges and self._kind == "gpt2":
            raise CheckpointError(f"{self._file.path}: {_KEY}merges is missing")
        return merges

    def _merges_by_score(self) -> list[tuple[str, str]]:
        """Every way to put a token together from two others, the best tokens' first."""
        scores = self._file.numbers(f"{_KEY}scores")
        if len(scores) < len(self._tokens):
            raise CheckpointError(
                f"{self._file.path}: {_KEY}scores: {len(scores)} for {len(self._tokens)} tokens, and no merges"
            )
        for what, count, most in (
            ("one", max(map(len, self._tokens)), MAX_PIECE_CHARS),
            ("all", sum(map(len, self._tokens)), MAX_PIECES_CHARS),
        ):
            if count > most:
                raise CheckpointError(
                    f"{self._file.path}: {_KEY}tokens: {what} of {count:,} characters, and no merges; at most {most:,}"
                )
        found: list[tuple[float, int, int]] = []
        for text, score in zip(self._tokens, scores, strict=False):
            for cut in range(1, len(text)):
                left, right = self._vocab.get(text[:cut]), self._vocab.get(text[cut:])
                if left is not None and right is not None:
                    found.append((-score, left, right))
            if len(found) > MAX_MERGES:
                raise CheckpointError(
                    f"{self._file.path}: {_KEY}tokens: more than {MAX_MERGES:,} ways to put one together from two"
                )
        return [(self._tokens[left], self._tokens[right]) for _, left, right in sorted(found)]

    def _add_whole_tokens(self, tokenizer: Tokenizer) -> None:
        """Tokens that are found in a text before it is cut: those that control, and those that users defined."""
        kinds = self._file.numbers(f"{_KEY}token_type")
        special: list[AddedToken] = []
        plain: list[AddedToken] = []
        for number, text in enumerate(self._tokens):
            kind = kinds[number] if number < len(kinds) else None
            # Some files call the ends of turns plain text.
            if kind in (_UNKNOWN, _CONTROL) or text in END_OF_TURN:
                special.append(AddedToken(text, normalized=False, special=True))
            elif kind == _USER_DEFINED:
                plain.append(AddedToken(text, normalized=False, special=False))
        tokenizer.add_special_tokens(special)
        tokenizer.add_tokens(plain)

    def _around(self, add_bos: bool) -> processors.TemplateProcessing:
        """What goes around a prompt: BOS and EOS, where the file says so or its kind of vocabulary has them."""
        ids: list[tuple[str, int]] = []
        parts = ["$A:0"]
        for key, default in (("bos", add_bos), ("eos", False)):
            if not self._file.flag(f"{_KEY}add_{key}_token", default):
                continue
            token = self._id(key)
            if token is None:
                raise CheckpointError(f"{self._file.path}: {_KEY}{key}_token_id is missing, which prompts here take")
            ids.append((self._tokens[token], token))
            parts.insert(0 if key == "bos" else len(parts), f"{self._tokens[token]}:0")
        return processors.TemplateProcessing(single=parts, pair=[*parts, "$B:1"], special_tokens=ids)

    def _id(self, key: str) -> int | None:
        token = self._file.number(f"{_KEY}{key}_token_id", None)
        if token is None:
            return _SENTENCEPIECE_IDS.get(key) if self._kind == "llama" else None
        if 0 <= token < len(self._tokens):
            return int(token)
        if key in ("bos", "eos"):
            raise CheckpointError(
                f"{self._file.path}: {_KEY}{key}_token_id: {token} is not among the {len(self._tokens)} tokens"
            )
        # Neither an unknown token nor padding is ever made here, and files are found that name none of theirs.
        return None
