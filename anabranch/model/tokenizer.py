"""Text to token ids and back, and the chat template, through transformers. Importing this needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from anabranch.errors import ChatTemplateError, CheckpointError, InvalidRequest
from anabranch.model.sources import ModelSource
from anabranch.model.token_length import longest_token_chars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of what a chat template says when it fails.
_MAX_REASON_CHARS = 500


class Tokenizer:
    """A model's tokenizer.

    Raises:
        CheckpointError: the model brings no tokenizer, or a broken one.
    """

    def __init__(self, source: ModelSource) -> None:
        from transformers import AutoTokenizer

        try:
            if source.kind == "gguf":
                tokenizer = AutoTokenizer.from_pretrained(
                    source.path.parent, gguf_file=source.path.name, local_files_only=True
                )
            else:
                tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
        # transformers and tokenizers raise many kinds, bare Exception among them, for a bad tokenizer file.
        except Exception as error:
            raise CheckpointError(f"{source.path}: the tokenizer cannot be loaded: {error}") from error
        self._tokenizer: PreTrainedTokenizerBase = tokenizer
        self.vocab_size: int = len(tokenizer)
        self.eos_token_ids: tuple[int, ...] = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.has_chat_template: bool = tokenizer.chat_template is not None

    @cached_property
    def longest_token_chars(self) -> int | None:
        """Most characters of a text that one token stands for; None where no bound is known."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else longest_token_chars(json.loads(backend.to_str()))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; `add_special_tokens` puts the model's own around it (most often BOS)."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
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
