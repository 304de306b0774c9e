"""What the orchestrator says to the processes that encode prompts, and what they answer."""

from __future__ import annotations

import msgspec

# Of a message that carries no prompt and no tokens.
MAX_SMALL_BYTES = 64 * 1024


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    pass


class EncodeText(_Message, frozen=True, kw_only=True, tag="text"):
    """To an encoder: a plain prompt."""

    text: str


class EncodeChat(_Message, frozen=True, kw_only=True, tag="chat"):
    """To an encoder: a chat of (role, content), to be put through the model's template."""

    messages: tuple[tuple[str, str], ...]


class Rendered(_Message, frozen=True, kw_only=True, tag="rendered"):
    """From an encoder: the chat template is done, the tokenizer begins."""


class Encoded(_Message, frozen=True, kw_only=True, tag="encoded"):
    """From an encoder: the prompt's token ids."""

    ids: list[int]


class Failed(_Message, frozen=True, kw_only=True, tag="failed"):
    """From an encoder or the fork server: the error, as its code and message."""

    code: str
    message: str


class Fork(_Message, frozen=True, kw_only=True, tag="fork"):
    """To the fork server, with the descriptor of the new encoder's connection."""

    name: str


class Forked(_Message, frozen=True, kw_only=True, tag="forked"):
    """From the fork server."""

    pid: int


class End(_Message, frozen=True, kw_only=True, tag="end"):
    """To the fork server: kill an encoder, if it lives, and wait for it."""

    pid: int


class Ended(_Message, frozen=True, kw_only=True, tag="ended"):
    """From the fork server: how the encoder ended, in words."""

    how: str


ToEncoder = EncodeText | EncodeChat
FromEncoder = Rendered | Encoded | Failed
ToForkServer = Fork | End
FromForkServer = Forked | Ended | Failed
