"""A worker without a model: speaks the real control protocol, and takes the time that rates say.

It computes prompts and generates, one step after the other. A step takes `step_s`, and `1 / prefill_tokens_per_s` for
each prompt token that it computes; at most `max_running` requests are in it. All tokens are alike.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from dataclasses import dataclass

from anabranch.protocol.workers import (
    Beat,
    Cancel,
    Ended,
    Generate,
    ModelIdentity,
    Register,
    Registered,
    Tokens,
    ToWorker,
    WorkerInfo,
    WorkerStats,
)
from anabranch.request.request import EndReason, Request
from anabranch.request.sampling_params import SamplingParams
from anabranch.request.token import Token
from anabranch.sampling.detokenizer import StopStringMatcher
from orchestrator.served_model import Prompt
from transport.control import ControlClient

CONTEXT = 4096
BLOCK_SIZE = 16
NUM_BLOCKS = 1 << 16
BEAT_S = 0.2
IDENTITY = ModelIdentity(
    model="simulated",
    model_fingerprint="",
    vocab_size=256,
    hidden_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a simulated worker is."""

    step_s: float
    prefill_tokens_per_s: float
    max_running: int


class SimText:
    """Tokens are characters."""

    def __init__(self, sampling: SamplingParams) -> None:
        self._matcher = StopStringMatcher(sampling.stop)

    def push(self, token_id: int) -> tuple[str, bool]:
        return self._matcher.push(chr(token_id))

    def finish(self) -> str:
        return self._matcher.flush()


class SimModel:
    """The orchestrator's side of it."""

    name = "simulated"
    identity = IDENTITY
    vocab_size = IDENTITY.vocab_size
    max_context = CONTEXT
    eos_token_ids = (0,)
    has_chat_template = False
    longest_token_chars = 1

    def expert_bytes(self, dtype: str, *, shared: bool) -> tuple[tuple[int, int], ...]:
        return ()

    def text_stream(self, sampling: SamplingParams) -> SimText:
        return SimText(sampling)


class SimEncoder:
    """A token for each byte."""

    async def start(self) -> None:
        pass

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def encode(self, prompt: Prompt) -> list[int]:
        assert isinstance(prompt, str)
        return list(prompt.encode())

    async def close(self) -> None:
        pass


@dataclass
class _Running:
    request: Request
    came_s: float
    began_s: float = 0.0
    prefill_s: float = 0.0
    num_left: int = 0


class SimWorker:
    """Life: construct -> `register` -> `run` until cancelled -> `close`."""

    def __init__(self, endpoint: str, name: str, rates: Rates) -> None:
        self._rates = rates
        self.info = WorkerInfo(
            name=name,
            role="colocated",
            pid=os.getpid(),
            host="simulated",
            model=IDENTITY.model,
            model_fingerprint="simulated",
            vocab_size=IDENTITY.vocab_size,
            hidden_size=IDENTITY.hidden_size,
            num_layers=IDENTITY.num_layers,
            num_heads=IDENTITY.num_heads,
            num_kv_heads=IDENTITY.num_kv_heads,
            head_dim=IDENTITY.head_dim,
            kv_dtype="float32",
            max_context=CONTEXT,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            planes=("tcp",),
            device="cpu",
            num_threads=1,
        )
        self._client = ControlClient(endpoint, ToWorker, name=name)
        self._waiting: deque[_Running] = deque()
        self._running: dict[tuple[str, int], _Running] = {}
        self._work = asyncio.Event()

    async def run(self) -> None:
        """Register, and serve until cancelled."""
        await self._client.send(Register(worker=self.info))
        tasks = [asyncio.create_task(work) for work in (self._receive(), self._beat(), self._step())]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.close()

    async def _receive(self) -> None:
        while True:
            match await self._client.recv():
                case Registered(error=error) if error is not None:
                    raise error.to_error()
                case Generate(request=request):
                    self._waiting.append(_Running(request, time.monotonic()))
                    self._work.set()
                case Cancel(request_id=request_id, epoch=epoch):
                    await self._cancel((request_id, epoch))

    async def _cancel(self, key: tuple[str, int]) -> None:
        found = self._running.pop(key, None)
        for waiting in self._waiting:
            if waiting.request.key == key:
                self._waiting.remove(waiting)
                found = waiting
                break
        if found is not None:
            await self._end(found, "cancelled")

    async def _beat(self) -> None:
        while True:
            stats = WorkerStats(
                num_free_blocks=NUM_BLOCKS,
                num_total_blocks=NUM_BLOCKS,
                num_running=len(self._running),
                num_waiting=len(self._waiting),
                num_leases=0,
                queued_tokens=sum(len(waiting.request.token_ids) for waiting in self._waiting),
            )
            await self._client.send(Beat(stats=stats))
            await asyncio.sleep(BEAT_S)

    async def _step(self) -> None:
        """Steps follow each other on a clock of their own, so that a loop that is late does not make them longer."""
        rates = self._rates
        end_s = time.monotonic()
        while True:
            while not self._waiting and not self._running:
                self._work.clear()
                await self._work.wait()
                end_s = time.monotonic()
            began_s, step_s = end_s, rates.step_s
            if self._waiting and len(self._running) < rates.max_running:
                new = self._waiting.popleft()
                new.began_s = began_s
                new.prefill_s = len(new.request.token_ids) / rates.prefill_tokens_per_s
                assert new.request.sampling.max_tokens is not None
                new.num_left = new.request.sampling.max_tokens - len(new.request.output_ids)
                step_s += new.prefill_s
                self._running[new.request.key] = new
            end_s = began_s + step_s
            await asyncio.sleep(max(0.0, end_s - time.monotonic()))
            await self._give_tokens()

    async def _give_tokens(self) -> None:
        running = list(self._running.values())
        tokens = []
        for item in running:
            request = item.request
            assert request.sampling.max_tokens is not None
            index = request.sampling.max_tokens - item.num_left
            token = Token(request_id=request.request_id, epoch=request.epoch, index=index, token_id=97)
            tokens.append(token)
            item.num_left -= 1
        if tokens:
            await self._client.send(Tokens(tokens=tuple(tokens)))
        for item in running:
            if item.num_left == 0 and self._running.pop(item.request.key, None) is not None:
                await self._end(item, "length")

    async def _end(self, item: _Running, reason: EndReason) -> None:
        ended = Ended(
            request_id=item.request.request_id,
            epoch=item.request.epoch,
            reason=reason,
            queue_s=max(0.0, item.began_s - item.came_s),
            prefill_s=item.prefill_s,
        )
        await self._client.send(ended)
