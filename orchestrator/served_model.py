"""What the orchestrator knows of the model: its name, its limits, and the way between text and tokens.

Tokens become text here, one at a time (`TextStream`). Prompts become tokens elsewhere (`PromptEncoder`), since that
may take long and runs the model's own template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from anabranch.protocol.workers import ModelIdentity
from anabranch.request.sampling_params import SamplingParams

# (role, content)
Messages = Sequence[tuple[str, str]]
Prompt = str | Messages


def num_chars_of(prompt: Prompt) -> int:
    """Characters of a prompt, roles and contents for a chat."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(role) + len(content) for role, content in prompt)


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
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends an answer unless the client ignores it: goes with every request, for workers know no other."""
        ...

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def longest_token_chars(self) -> int | None:
        """Most characters of a text that one token stands for; None where there is no such bound."""
        ...

    def expert_bytes(self, dtype: str, *, shared: bool) -> tuple[tuple[int, int], ...]:
        """For each layer how many experts it has, and bytes of one of them; a dense layer has one expert.

        Args:
            shared: whether FFN workers hold shared experts, each as a layer behind the others.
        """
        ...

    def text_stream(self, sampling: SamplingParams) -> TextStream: ...


class PromptEncoder(Protocol):
    """Turns prompts into token ids away from the event loop. Life: `start` -> `run`, encode -> `close`."""

    async def start(self) -> None:
        """Get ready. Raises AnabranchError."""
        ...

    async def run(self) -> None:
        """Return or raise only when no prompt can be encoded any more."""
        ...

    async def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, special tokens at its start included, or of a chat under the model's template.

        A caller that is cancelled frees its place at once. Raises AnabranchError.
        """
        ...

    async def close(self) -> None:
        """End at once, whatever is being encoded."""
        ...
