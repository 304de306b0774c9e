"""What the orchestrator knows of the model: its name, its limits, and the way between text and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from anabranch.protocol.workers import ModelIdentity
from anabranch.request.sampling_params import SamplingParams


class TextStream(Protocol):
    """Turns one answer's tokens into text as they come, and watches for stop strings."""

    def push(self, token_id: int) -> tuple[str, bool]:
        """The text that became certain with this token, and whether a stop string is complete.

        Text that might yet become a stop string or is half a character is held back; the stop string itself
        is never given.
        """
        ...

    def finish(self) -> str:
        """The text held back, once no more tokens come."""
        ...


class ServedModel(Protocol):
    """Encoding may take long and is called from threads."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> ModelIdentity:
        """What workers must serve."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context(self) -> int:
        """Most tokens that the model was made for."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def has_chat_template(self) -> bool: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, special tokens at its start included."""
        ...

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a chat of (role, content) under the model's template. Raises InvalidRequest."""
        ...

    def text_stream(self, sampling: SamplingParams) -> TextStream: ...
