"""Turns prompts into token ids in processes that can be killed: no prompt, no chat template holds up all others.

    Gateway -> EncoderPool -> Lane (a queue and its encoders) -> Encoder -> a process
                                                                  ForkServer starts and ends them

Texts and chats have lanes of their own, since chats run the model's template; and so have long ones, which take
seconds. So a short text waits for short texts alone.
"""

from __future__ import annotations

import asyncio
from functools import partial

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import DeadlineExceeded, Draining, PeerLost
from anabranch.system.clock import timeout
from orchestrator.encoding.encoder import Encoder
from orchestrator.encoding.fork_server import ForkServer
from orchestrator.encoding.lane import Lane
from orchestrator.encoding.messages import MAX_SMALL_BYTES, EncodeChat, EncodeText
from orchestrator.encoding.process import Encode, start_fork_server
from orchestrator.encoding.prompt import PromptTokenizer, encode_prompt
from orchestrator.served_model import Prompt, num_chars_of

# A tokenizer takes some 30 ms for so many characters.
SHORT_CHARS = 16 * 1024
# Prompts of the greatest length that may wait in one lane.
_MAX_QUEUED_PROMPTS = 8
# What a tokenizer keeps of one character: up to four tokens of it, each with its text, offsets and masks.
_MEMORY_PER_CHAR_BYTES = 1024
_MEMORY_BASE_BYTES = 256 * 1024 * 1024
# UTF-8 has at most four bytes for a character, and MessagePack some more for each of 1,024 messages.
_REQUEST_BYTES_PER_CHAR = 4
# Token ids take five bytes each; the longest known expansion of one character is into 18, of several bytes.
_ANSWER_BYTES_PER_CHAR = 512
_START_TIMEOUT_S = 30.0


def fork_encoders(config: OrchestratorConfig, tokenizer: PromptTokenizer) -> EncoderPool:
    """A pool for a loaded tokenizer; to be called while this process has one thread."""
    encode: Encode = partial(encode_prompt, tokenizer, config.max_prompt_chars)
    pid, control = start_fork_server(
        encode,
        memory_bytes=_MEMORY_BASE_BYTES + _MEMORY_PER_CHAR_BYTES * config.max_prompt_chars,
        max_request_bytes=MAX_SMALL_BYTES + _REQUEST_BYTES_PER_CHAR * config.max_prompt_chars,
    )
    return EncoderPool(config, ForkServer(pid, control))


class EncoderPool:
    """A `PromptEncoder`."""

    def __init__(self, config: OrchestratorConfig, server: ForkServer) -> None:
        self._server = server
        start_encoder = partial(
            Encoder.start,
            server,
            timeout_s=config.encode_timeout_s,
            max_answer_bytes=MAX_SMALL_BYTES + _ANSWER_BYTES_PER_CHAR * config.max_prompt_chars,
        )

        def lane(name: str) -> Lane:
            return Lane(
                name,
                config.encoders_per_lane,
                start_encoder,
                max_queued_chars=_MAX_QUEUED_PROMPTS * config.max_prompt_chars,
                queue_timeout_s=config.queue_timeout_s,
            )

        self._text, self._chat = lane("text"), lane("chat")
        self._long_text, self._long_chat = lane("longtext"), lane("longchat")
        self._lanes = (self._text, self._chat, self._long_text, self._long_chat)

    async def start(self) -> None:
        """Start the processes. Raises DeadlineExceeded."""
        await self._server.start()
        for lane in self._lanes:
            lane.start()
        try:
            async with timeout(_START_TIMEOUT_S):
                for lane in self._lanes:
                    await lane.ready.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"the processes that encode prompts were not there within {_START_TIMEOUT_S:g} s"
            ) from None

    async def run(self) -> None:
        """Wait until no prompt can be encoded any more. Raises PeerLost, or what a lane raised."""
        ended = asyncio.create_task(self._server.wait_ended())
        tasks = [task for lane in self._lanes for task in lane.tasks]
        try:
            done, _ = await asyncio.wait([ended, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            raise PeerLost("the process that starts encoders has ended")
        finally:
            ended.cancel()

    async def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises Overloaded, and see `Encoder.encode`."""
        num_chars = num_chars_of(prompt)
        short = num_chars <= SHORT_CHARS
        if isinstance(prompt, str):
            return await (self._text if short else self._long_text).encode(EncodeText(text=prompt), num_chars)
        return await (self._chat if short else self._long_chat).encode(EncodeChat(messages=tuple(prompt)), num_chars)

    async def close(self) -> None:
        """End every process, whatever it does, and every prompt that waits."""
        tasks = [task for lane in self._lanes for task in lane.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for lane in self._lanes:
            lane.fail_all(Draining("the orchestrator ends"))
        await self._server.close()
