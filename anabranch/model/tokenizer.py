"""Text to token ids and back, and the chat template, through transformers. Importing this needs no torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.errors import CheckpointError, InvalidRequest
from anabranch.model.gguf_header import check_gguf_header
from anabranch.model.sources import ModelSource
from anabranch.model.tokenizer_files import checked_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

# Texts that make a regular expression with nested repeats go back over its steps.
_TRIALS = tuple(run * 40 + end for run in ("a", "aB", "é", "1", " ", "\n", ".") for end in ("!", "a"))
MAX_TRIAL_S = 5.0


class Tokenizer:
    """A model's tokenizer.

    Raises:
        CheckpointError: the model brings no tokenizer, or one that is broken, out of bounds, or fails at a trial.
    """

    def __init__(self, source: ModelSource) -> None:
        if source.kind == "gguf":
            check_gguf_header(source.path)
            tokenizer = _load(source.path, source.path.parent, gguf_file=source.path.name)
        else:
            with checked_tokenizer(source.path) as folder:
                tokenizer = _load(source.path, folder)
        self._path = source.path
        self._tokenizer: PreTrainedTokenizerBase = tokenizer
        self.vocab_size: int = len(tokenizer)
        self.eos_token_ids: tuple[int, ...] = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.has_chat_template: bool = tokenizer.chat_template is not None
        self._try()

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

    def apply_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation under the model's chat template, ready for the assistant's answer.

        Args:
            messages: each with `role` and `content`.

        Raises:
            InvalidRequest: the model has no template, or its template refuses the conversation.
        """
        if not self.has_chat_template:
            raise InvalidRequest("this model has no chat template; send a plain prompt", "messages")
        from jinja2 import TemplateError

        try:
            ids = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(f"the model's chat template refuses them: {error}", "messages") from error
        return [int(token) for token in ids]

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


def _load(path: Path, folder: Path, **how: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **how)
    # transformers and tokenizers raise many kinds, bare Exception among them, for a bad tokenizer file.
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        reason = str(error).replace(str(folder), str(path))
        raise CheckpointError(f"{path}: the tokenizer cannot be loaded: {reason}") from error


def _is_panic(error: BaseException) -> bool:
    """Whether Rust code panicked: the class, of no module that could be imported, is not below Exception."""
    return type(error).__name__ == "PanicException"
