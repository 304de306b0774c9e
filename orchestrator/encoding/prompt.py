"""What an encoder does with one prompt: the chat template, then the tokenizer, with everything that can fail named."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Protocol

from anabranch.errors import AnabranchError, ChatTemplateError, InvalidRequest
from orchestrator.encoding.messages import Encoded, EncodeText, Failed, FromEncoder, Rendered, ToEncoder

logger = logging.getLogger(__name__)


class PromptTokenizer(Protocol):
    """The part of a model's tokenizer that prompts need."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """The prompt's text. Raises InvalidRequest, ChatTemplateError."""
        ...


def encode_prompt(tokenizer: PromptTokenizer, max_chars: int, request: ToEncoder) -> Iterator[FromEncoder]:
    """Answer a request; the last answer is Encoded or Failed.

    Args:
        max_chars: most characters that a chat may become under the template.
    """
    try:
        if isinstance(request, EncodeText):
            yield Encoded(ids=tokenizer.encode(request.text))
            return
        text = tokenizer.render_chat([{"role": role, "content": content} for role, content in request.messages])
        _check_size(text, request.messages, max_chars)
        yield Rendered()
        yield Encoded(ids=tokenizer.encode(text, add_special_tokens=False))
    except AnabranchError as error:
        yield Failed(code=error.code, message=str(error))
    except MemoryError:
        raise
    except Exception:
        logger.exception("a prompt cannot be encoded")
        yield Failed(code=AnabranchError.code, message="the tokenizer failed; the orchestrator's log says why")


def _check_size(text: str, messages: tuple[tuple[str, str], ...], max_chars: int) -> None:
    """Raise where the text is too long: InvalidRequest if most of it is the client's own, else ChatTemplateError."""
    if len(text) <= max_chars:
        return
    num_chars = sum(len(role) + len(content) for role, content in messages)
    became = f"{num_chars} characters become {len(text)} under the model's chat template"
    if 2 * num_chars > len(text):
        raise InvalidRequest(f"{became}; max_prompt_chars allows {max_chars}", "chat")
    raise ChatTemplateError(f"{became}, more than max_prompt_chars ({max_chars}) allows")
