"""One process that encodes prompts, as the orchestrator sees it."""

from __future__ import annotations

import asyncio

from anabranch.errors import (
    AnabranchError,
    ChatTemplateError,
    DeadlineExceeded,
    FrameTooLarge,
    MalformedMessage,
    PeerLost,
    WorkerDied,
    error_from_code,
)
from orchestrator.encoding.fork_server import ForkServer
from orchestrator.encoding.messages import (
    EncodeChat,
    Encoded,
    Failed,
    FromEncoder,
    Rendered,
    ToEncoder,
)
from transport.local_frames import FrameReader, frame

# The time limit is counted in parts: while this process is stopped, with all others, no more than one passes.
_NUM_TICKS = 4


class Encoder:
    """Encodes one prompt at a time; what takes too long ends it. Life: `start` -> encode -> `end`."""

    def __init__(
        self,
        server: ForkServer,
        pid: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        timeout_s: float,
        max_answer_bytes: int,
    ) -> None:
        self.pid = pid
        self._server = server
        self._reader = reader
        self._writer = writer
        self._timeout_s = timeout_s
        self._answers = FrameReader[FromEncoder](FromEncoder, max_answer_bytes)  # type: ignore[arg-type]
        self._rendering = False
        self._how_ended = ""

    @property
    def alive(self) -> bool:
        """Whether another prompt may be given: the process has not ended, as far as is known."""
        return not self._how_ended and not self._reader.at_eof()

    @classmethod
    async def start(cls, server: ForkServer, name: str, *, timeout_s: float, max_answer_bytes: int) -> Encoder:
        """Fork one. Raises AnabranchError."""
        pid, connection = await server.fork(name)
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        return cls(server, pid, reader, writer, timeout_s=timeout_s, max_answer_bytes=max_answer_bytes)

    async def encode(self, request: ToEncoder) -> list[int]:
        """Token ids of a prompt.

        Raises:
            InvalidRequest: the prompt is not what the model's template takes.
            ChatTemplateError: the template failed, or took too long or too much.
            DeadlineExceeded: the tokenizer took too long.
            WorkerDied: the process ended while it tokenised.
        """
        assert self.alive
        self._rendering = isinstance(request, EncodeChat)
        answering = asyncio.create_task(self._exchange(request), name=f"encoder {self.pid}")
        try:
            for _ in range(_NUM_TICKS):
                done, _ = await asyncio.wait({answering}, timeout=self._timeout_s / _NUM_TICKS)
                if done:
                    answer = answering.result()
                    break
            else:
                await self.end()
                raise self._too_slow()
        finally:
            answering.cancel()
        if answer is None:
            how = await self.end()
            raise self._died(how)
        if isinstance(answer, Failed):
            raise error_from_code(answer.code, answer.message)
        return answer.ids

    def disconnect(self) -> None:
        """Close the connection; the process ends when it reads the end of it."""
        self._writer.close()

    async def end(self) -> str:
        """Kill the process, if it lives. Returns how it ended."""
        self.disconnect()
        if not self._how_ended:
            try:
                self._how_ended = await self._server.end(self.pid)
            except PeerLost as error:
                self._how_ended = str(error)
        return self._how_ended

    async def _exchange(self, request: ToEncoder) -> Encoded | Failed | None:
        """The last answer; None where the process ended or broke before it."""
        try:
            self._writer.write(frame(request))
            await self._writer.drain()
            while isinstance(answer := await self._answers.read(self._reader), Rendered):
                self._rendering = False
        except (ConnectionError, FrameTooLarge, MalformedMessage):
            return None
        return answer

    def _too_slow(self) -> AnabranchError:
        if self._rendering:
            return ChatTemplateError(
                f"the model's chat template was not done after {self._timeout_s:g} s (encode_timeout_s)"
            )
        return DeadlineExceeded(f"encode_timeout_s: the prompt was not tokenised within {self._timeout_s:g} s")

    def _died(self, how: str) -> AnabranchError:
        if self._rendering:
            return ChatTemplateError(f"the model's chat template ended the process that renders it ({how})")
        return WorkerDied(f"the process that tokenised the prompt ended ({how})")
