"""The orchestrator's end of the fork server: starts encoders, ends them, and knows when the server itself ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from typing import TypeVar

from anabranch.errors import AnabranchError, PeerLost, error_from_code
from anabranch.system.clock import timeout
from orchestrator.encoding.messages import (
    MAX_SMALL_BYTES,
    End,
    Ended,
    Failed,
    Fork,
    Forked,
    FromForkServer,
    ToForkServer,
)
from transport.local_frames import FrameReader, frame

# The server only forks, kills and reaps; it answers within milliseconds unless the machine stands still. One that does
# not counts as lost: its late answer would be taken for the next one.
ANSWER_TIMEOUT_S = 30.0
END_TIMEOUT_S = 5.0
_END_POLL_S = 0.005

_A = TypeVar("_A", Forked, Ended)


class ForkServer:
    """Construct with what `start_fork_server` gave -> `start` -> fork, end -> `close`.

    Args:
        pid: of the server, a child of this process.
        control: this end of its connection.
    """

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        # Descriptors travel beside the bytes, which asyncio's transports cannot send: these write on a socket of
        # their own. Requests are a few bytes, answered one at a time, so writing never waits.
        self._sender = control.dup()
        self._control = control
        self._messages = FrameReader[FromForkServer](FromForkServer, MAX_SMALL_BYTES)  # type: ignore[arg-type]
        self._turn = asyncio.Lock()
        self._answers: asyncio.Queue[FromForkServer] = asyncio.Queue()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        reader, self._writer = await asyncio.open_unix_connection(sock=self._control)
        self._reading = asyncio.create_task(self._read(reader), name="fork server")

    async def fork(self, name: str) -> tuple[int, socket.socket]:
        """Start an encoder. Returns its process id and this end of its connection. Raises AnabranchError."""
        ours, theirs = socket.socketpair()
        try:
            answer = await self._ask(Fork(name=name), theirs, Forked)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return answer.pid, ours

    async def end(self, pid: int) -> str:
        """Kill an encoder, if it lives. Returns how it ended, in words. Raises AnabranchError."""
        return (await self._ask(End(pid=pid), None, Ended)).how

    async def wait_ended(self) -> None:
        """Wait until the server, and with it every encoder, has ended or counts as lost."""
        assert self._reading is not None
        await asyncio.wait({self._reading})

    async def close(self) -> None:
        """End the server and every encoder."""
        if self._reading is not None:
            self._reading.cancel()
        self._disconnect()
        if not await self._reaped():
            os.kill(self.pid, signal.SIGKILL)
            await self._reaped()

    async def _ask(self, message: ToForkServer, descriptor: socket.socket | None, kind: type[_A]) -> _A:
        # Shielded: a cancelled caller must not leave an answer behind for the next.
        exchange = asyncio.create_task(self._exchange(message, descriptor, kind), name="fork server exchange")
        exchange.add_done_callback(lambda task: None if task.cancelled() else task.exception())
        return await asyncio.shield(exchange)

    async def _exchange(self, message: ToForkServer, descriptor: socket.socket | None, kind: type[_A]) -> _A:
        passed = None if descriptor is None else descriptor.dup()
        try:
            async with self._turn:
                answer = await self._answer(message, passed)
        finally:
            if passed is not None:
                passed.close()
        if isinstance(answer, Failed):
            raise error_from_code(answer.code, answer.message)
        if not isinstance(answer, kind):
            self._disconnect()
            raise PeerLost(f"the process that starts encoders said {answer} where {kind.__name__} was due")
        return answer

    async def _answer(self, message: ToForkServer, passed: socket.socket | None) -> FromForkServer:
        """Ask, and wait for what the server says next; when it says nothing, it is never asked again."""
        try:
            async with timeout(ANSWER_TIMEOUT_S):
                try:
                    socket.send_fds(self._sender, [frame(message)], [] if passed is None else [passed.fileno()])
                except OSError as error:
                    raise _lost() from error
                return await self._answers.get()
        except TimeoutError:
            self._disconnect()
            raise PeerLost(f"the process that starts encoders said nothing for {ANSWER_TIMEOUT_S:g} s") from None

    def _disconnect(self) -> None:
        """Close this end: the server ends once it reads that, and `wait_ended` need not wait for it."""
        if self._writer is not None:
            self._writer.close()
        else:
            self._control.close()
        # The server reads the end only when every copy of this end is closed.
        self._sender.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while (answer := await self._messages.read(reader)) is not None:
                self._answers.put_nowait(answer)
        finally:
            error = _lost()
            self._answers.put_nowait(Failed(code=error.code, message=str(error)))

    async def _reaped(self) -> bool:
        """Whether the server's process is gone within END_TIMEOUT_S."""
        for _ in range(round(END_TIMEOUT_S / _END_POLL_S)):
            if _has_ended(self.pid):
                return True
            await asyncio.sleep(_END_POLL_S)
        return False


def _has_ended(pid: int) -> bool:
    """Whether a child of this process is gone; reaps it."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True


def _lost() -> AnabranchError:
    return PeerLost("the process that starts encoders has ended")
