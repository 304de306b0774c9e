"""Text to token ids and back, and the chat template, through transformers. Importing this needs no torch."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.errors import ChatTemplateError, CheckpointError, InvalidRequest, ModelError
from anabranch.model.end_of_turn import END_OF_TURN
from anabranch.model.gguf_header import check_gguf_header
from anabranch.model.sources import ModelSource
from anabranch.model.token_length import longest_token_chars
from anabranch.model.tokenizer_files import checked_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of what a chat template says when it fails.
_MAX_REASON_CHARS = 500


logger = logging.getLogger(__name__)

# Texts that make a regular expression with nested repeats go back over its steps.
_TRIALS = tuple(run * 40 + end for run in ("a", "aB", "é", "1", " ", "\n", ".") for end in ("!", "a"))
MAX_TRIAL_S = 5.0


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        eos_token_ids: the end-of-sequence token, and those that end a turn: of a folder, those that its chat template
            writes; of a GGUF file, which often names but one, all that its vocabulary has.

    Raises:
        CheckpointError: the model brings no tokenizer, or one that is broken, out of bounds, or fails at a trial.
        UnsupportedArchitecture: a GGUF file's kind of vocabulary or pre-tokenizer is not known, by name.
    """

    def __init__(self, source: ModelSource) -> None:
        if source.kind == "gguf":
            check_gguf_header(source.path)
            tokenizer = _load_gguf(source.path)
        else:
            with checked_tokenizer(source.path) as folder:
                tokenizer = _load_folder(source.path, folder)
        self._path = source.path
        self._tokenizer: PreTrainedTokenizerBase = tokenizer
        self.vocab_size: int = len(tokenizer)
        self.eos_token_ids = _eos_token_ids(tokenizer, every_end_of_turn=source.kind == "gguf")
        self.has_chat_template: bool = tokenizer.chat_template is not None
        self._try()

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, chat template included."""
        self._tokenizer.save_pretrained(folder)

    @cached_property
    def longest_token_chars(self) -> int | None:
        """Most characters of a text that one token stands for; None where no bound is known."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else longest_token_chars(json.loads(backend.to_str()))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; `add_special_tokens` puts the model's own around it (most often BOS).

        Raises:
            CheckpointError: the tokenizer broke off, as a regular expression of it does at some texts.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise CheckpointError(f"{self._path}: the tokenizer broke off at a text: {error}") from error
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that make no whole character become U+FFFD."""
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation under the model's chat template, ready for the assistant's answer.

        It has all special tokens: encode it with `add_special_tokens=False`.

        The template is a program that came with the model: transformers runs it in Jinja's sandbox, which bounds
        neither its time nor its memory.

        Args:
            messages: each with `role` and `content`.

        Raises:
            InvalidRequest: the model has no template, or its template refuses the conversation.
            ChatTemplateError: the template is broken, or does not provide for such a conversation.
        """
        if not self.has_chat_template:
            raise InvalidRequest("this model has no chat template; send a plain prompt", "messages")
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:
            reason = str(error)[:_MAX_REASON_CHARS]
            # What a template raises by itself is of the base class; Jinja's own errors are of classes below it.
            if type(error) is TemplateError:
                raise InvalidRequest(f"the model's chat template refuses them: {reason}", "messages") from error
            raise ChatTemplateError(f"the model's chat template failed: {type(error).__name__}: {reason}") from error
        return text

    def _try(self) -> None:
        """Encode short texts that slow regular expressions choke on, rather than let a client's prompt be the first."""
        for text in _TRIALS:
            begin = time.monotonic()
            try:
                self.encode(text)
            except CheckpointError:
                raise
            except Exception as error:  # it may know no token for a character; a prompt without it is as good as ever
                logger.info("%s: the tokenizer cannot encode %r...: %s", self._path, text[:8], error)
            took_s = time.monotonic() - begin
            if took_s > MAX_TRIAL_S:
                raise CheckpointError(
                    f"{self._path}: the tokenizer takes {took_s:.0f} s for {len(text)} characters ({text[:8]!r}...)"
                )


def _load_gguf(path: Path) -> PreTrainedTokenizerBase:
    from anabranch.model.gguf_tokenizer import read_gguf_tokenizer

    with _named(path):
        return read_gguf_tokenizer(path)


def _load_folder(path: Path, folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _named(path, folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def _named(path: Path, folder: Path | None = None) -> Iterator[None]:
    """Make what transformers and tokenizers raise for a bad file, bare Exception among it, a CheckpointError."""
    try:
        yield
    except ModelError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        reason = str(error) if folder is None else str(error).replace(str(folder), str(path))
        raise CheckpointError(f"{path}: the tokenizer cannot be loaded: {reason}") from error


def _is_panic(error: BaseException) -> bool:
    """Whether Rust code panicked: the class, of no module that could be imported, is not below Exception."""
    return type(error).__name__ == "PanicException"


def _eos_token_ids(tokenizer: PreTrainedTokenizerBase, *, every_end_of_turn: bool) -> tuple[int, ...]:
    # A name counts where it is one token: in text that is cut to pieces it ends nothing.
    turns = {name: token for name, token in tokenizer.get_added_vocab().items() if name in END_OF_TURN}
    if not every_end_of_turn:
        # Several templates are a dictionary.
        written = str(tokenizer.chat_template or "")
        turns = {name: token for name, token in turns.items() if name in written}
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys((*eos, *sorted(turns.values()))))
