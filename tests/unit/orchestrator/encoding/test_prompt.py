"""One prompt in an encoder: its answers, and the name of everything that fails."""

from __future__ import annotations

import logging

import pytest

from anabranch.errors import ChatTemplateError
from orchestrator.encoding.messages import EncodeChat, Encoded, EncodeText, Failed, FromEncoder, Rendered
from orchestrator.encoding.prompt import encode_prompt

pytestmark = pytest.mark.unit

MAX_CHARS = 100


class ByteTokenizer:
    """Bytes after a 1; the template repeats the first content as often as its role says."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if text == "bug":
            raise RuntimeError("/secret/path")
        return [1] * add_special_tokens + list(text.encode())

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        if messages[0]["role"] == "broken":
            raise ChatTemplateError("the model's chat template failed: ZeroDivisionError: division by zero")
        return messages[0]["content"] * int(messages[0]["role"])


def answers(request: EncodeText | EncodeChat) -> list[FromEncoder]:
    return list(encode_prompt(ByteTokenizer(), MAX_CHARS, request))


def chat(role: str, content: str) -> EncodeChat:
    return EncodeChat(messages=((role, content),))


def test_ids() -> None:
    assert answers(EncodeText(text="ab")) == [Encoded(ids=[1, 97, 98])]
    assert answers(chat("2", "ab")) == [Rendered(), Encoded(ids=[97, 98, 97, 98])]
    assert answers(chat("1", "x" * 100))[-1] == Encoded(ids=[120] * 100)


@pytest.mark.parametrize(
    ("request_", "code", "says"),
    [
        (chat("broken", "x"), "chat_template", "the model's chat template failed: ZeroDivisionError"),
        (
            chat("60000000", "x"),
            "chat_template",
            "9 characters become 60000000 under the model's chat template, more than",
        ),
        (chat("3", "x" * 40), "chat_template", "41 characters become 120 under"),
        # Most of it is what the client sent.
        (
            chat("1", "x" * 101),
            "invalid_request",
            "chat: 102 characters become 101 under the model's chat template; max_pr",
        ),
        (EncodeText(text="bug"), "internal", "the tokenizer failed; the orchestrator's log says why"),
    ],
)
def test_failures(caplog, request_, code: str, says: str) -> None:
    with caplog.at_level(logging.INFO):
        (failed,) = answers(request_)
    assert isinstance(failed, Failed)
    assert failed.code == code
    assert failed.message.startswith(says)
    assert len(caplog.records) == (code == "internal")
