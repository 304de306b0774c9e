"""Text to token ids and back, and the chat template, through transformers. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.errors import CheckpointError, InvalidRequest, ModelError
from anabranch.model.end_of_turn import END_OF_TURN
from anabranch.model.sources import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        eos_token_ids: the end-of-sequence token, and those that end a turn: of a folder, those that its chat template
            writes; of a GGUF file, which often names but one, all that its vocabulary has.

    Raises:
        CheckpointError: the model brings no tokenizer, or a broken one.
        UnsupportedArchitecture: a GGUF file's kind of vocabulary or pre-tokenizer is not known, by name.
    """

    def __init__(self, source: ModelSource) -> None:
        from transformers import AutoTokenizer

        try:
            if source.kind == "gguf":
                from anabranch.model.gguf_tokenizer import read_gguf_tokenizer

                tokenizer = read_gguf_tokenizer(source.path)
            else:
                tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
        except ModelError:
            raise
        # transformers and tokenizers raise many kinds, bare Exception among them, for a bad tokenizer file.
        except Exception as error:
            raise CheckpointError(f"{source.path}: the tokenizer cannot be loaded: {error}") from error
        self._tokenizer: PreTrainedTokenizerBase = tokenizer
        self.vocab_size: int = len(tokenizer)
        self.eos_token_ids = _eos_token_ids(tokenizer, every_end_of_turn=source.kind == "gguf")
        self.has_chat_template: bool = tokenizer.chat_template is not None

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, chat template included."""
        self._tokenizer.save_pretrained(folder)

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


def _eos_token_ids(tokenizer: PreTrainedTokenizerBase, *, every_end_of_turn: bool) -> tuple[int, ...]:
    # A name counts where it is one token: in text that is cut to pieces it ends nothing.
    turns = {name: token for name, token in tokenizer.get_added_vocab().items() if name in END_OF_TURN}
    if not every_end_of_turn:
        # Several templates are a dictionary.
        written = str(tokenizer.chat_template or "")
        turns = {name: token for name, token in turns.items() if name in written}
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys((*eos, *sorted(turns.values()))))
