"""One real worker, and a test that speaks the orchestrator's side of the control channel to it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from anabranch.config.worker import WorkerConfig
from anabranch.protocol.kv import KvDestination
from anabranch.protocol.workers import (
    Beat,
    Ended,
    Prefill,
    Register,
    Registered,
    Reserve,
    Reserved,
    Tokens,
    ToOrchestrator,
    ToWorker,
)
from anabranch.request.request import Request
from anabranch.request.sampling_params import SamplingParams
from decode.worker import DecodeWorker
from prefill.worker import PrefillWorker
from runtime.worker import Worker
from tests.support.waiting import WAIT_S, eventually_async
from transport.control import ControlServer

M = TypeVar("M")


class ScriptedOrchestrator:
    """Use as `async with`; the worker runs in the same event loop.

    Args:
        folder: for the control channel's socket.
        make: makes the worker; None: as `role` says.
        options: of the worker.
    """

    def __init__(
        self,
        folder: Path,
        model: Path | str,
        role: str,
        make: Callable[[WorkerConfig], Worker] | None = None,
        **options: object,
    ) -> None:
        defaults: dict[str, object] = {
            "dtype": "float32",
            "threads": 1,
            "kv_cache_bytes": 4 << 20,
            "native_kernels": False,
            "heartbeat_s": 0.05,
        }
        self._server = ControlServer(f"ipc://{folder}/{secrets.token_hex(4)}", ToOrchestrator)
        self.config = WorkerConfig(
            role=role,
            name=f"{role}-0",
            model=str(model),
            orchestrator=self._server.endpoint,
            **{**defaults, **options},
        )
        make = make or (PrefillWorker if role == "prefill" else DecodeWorker)
        self.worker: Worker = make(self.config)
        self.peer = b""
        self.beats: list[Beat] = []

    async def __aenter__(self) -> ScriptedOrchestrator:
        await self._server.start()
        self.run = asyncio.create_task(self.worker.run())
        self.peer, register = await self.next()
        assert isinstance(register, Register)
        self.info = register.worker
        return self

    async def __aexit__(self, *_: object) -> None:
        self.run.cancel()
        await asyncio.gather(self.run, return_exceptions=True)
        await self._server.close()

    async def accept(self) -> None:
        """Take the worker in."""
        await self.send(Registered())

    async def send(self, message: ToWorker) -> None:
        await self._server.send(self.peer, message)

    async def next(self) -> tuple[bytes, ToOrchestrator]:
        """The next message that is not a beat."""
        async with asyncio.timeout(WAIT_S):
            while True:
                peer, message = await self._server.recv()
                if not isinstance(message, Beat):
                    return peer, message  # type: ignore[return-value]
                self.beats.append(message)

    async def expect(self, kind: type[M]) -> M:
        """The next message, which must be of this kind."""
        _, message = await self.next()
        assert isinstance(message, kind), f"{message} where {kind.__name__} was due"
        return message

    async def reserve(self, request: Request) -> KvDestination:
        """Have a decode worker reserve room."""
        await self.send(Reserve(request=request))
        reserved = await self.expect(Reserved)
        assert (reserved.request_id, reserved.epoch) == request.key
        return reserved.destination

    async def prefill(self, request: Request, destination: KvDestination) -> None:
        await self.send(Prefill(request=request, destination=destination))

    async def answer(self, request: Request) -> tuple[tuple[int, ...], Ended]:
        """Tokens and end of a request, the indexes checked."""
        ids: list[int] = []
        while True:
            _, message = await self.next()
            if isinstance(message, Ended):
                assert (message.request_id, message.epoch) == request.key
                return tuple(ids), message
            assert isinstance(message, Tokens), message
            for token in message.tokens:
                assert (token.request_id, token.epoch, token.index) == (
                    *request.key,
                    len(request.output_ids) + len(ids),
                )
                ids.append(token.token_id)

    async def idle(self) -> None:
        """Wait until the worker has all its blocks and no request."""
        await eventually_async(
            lambda: (
                self.worker.is_idle()
                and self.worker.stats().num_free_blocks == self.worker.stats().num_total_blocks
                and self.worker.stats().num_leases == 0
            )
        )
        self.worker.engine.cache.check_integrity()  # type: ignore[attr-defined]


def request(
    prompt: tuple[int, ...], max_tokens: int, name: str = "a", epoch: int = 0, output: tuple[int, ...] = ()
) -> Request:
    """A greedy request that goes on past the end of sequence."""
    sampling = SamplingParams(max_tokens=max_tokens)
    return Request(request_id=name, epoch=epoch, prompt_ids=prompt, output_ids=output, sampling=sampling)


def changed(item: M, **changes: object) -> M:
    return msgspec.structs.replace(item, **changes)  # type: ignore[type-var]


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario to its end."""

    async def main() -> None:
        await scenario()

    asyncio.run(main())
