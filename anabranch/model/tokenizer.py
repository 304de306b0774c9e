"""Text to token ids and back, and the chat template, through transformers. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from anabranch.errors import CheckpointError, InvalidRequest
from anabranch.model.sources import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
