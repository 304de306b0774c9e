"""A `PromptEncoder` inside the test's process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from anabranch.errors import error_from_code
from anabranch.model.tokenizer import Tokenizer
from orchestrator.encoding.messages import EncodeChat, Encoded, EncodeText, Failed
from orchestrator.encoding.prompt import encode_prompt
from orchestrator.served_model import Prompt


class ThreadEncoder:
    """Encodes in one thread, first come, first served.

    Args:
        encode: what the thread does; may raise.
    """

    def __init__(self, encode: Callable[[Prompt], list[int]]) -> None:
        self._encode = encode
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ThreadEncoder:
        """As encoder processes do it."""

        def encode(prompt: Prompt) -> list[int]:
            request = EncodeText(text=prompt) if isinstance(prompt, str) else EncodeChat(messages=tuple(prompt))
            *_, last = encode_prompt(tokenizer, 1 << 20, request)
            if isinstance(last, Failed):
                raise error_from_code(last.code, last.message)
            assert isinstance(last, Encoded)
            return last.ids

        return cls(encode)

    async def start(self) -> None:
        pass

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def encode(self, prompt: Prompt) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, prompt)

    async def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
