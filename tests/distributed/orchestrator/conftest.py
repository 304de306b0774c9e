"""A real orchestrator over its real channels, with scripted workers and the real client.

The model's tokens are bytes: token 97 is "a". Token 0 ends an answer.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec
import pytest
import uvloop

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import InvalidRequest
from anabranch.parallel.layout import KvLayout
from anabranch.protocol.kv import KvDestination, KvStreamStats
from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import (
    Beat,
    Ended,
    ModelIdentity,
    Prefill,
    PrefillEnded,
    Register,
    Registered,
    Reserve,
    Reserved,
    Tokens,
    ToOrchestrator,
    ToWorker,
    WorkerInfo,
    WorkerStats,
)
from anabranch.request.request import EndReason, Request
from anabranch.request.sampling_params import SamplingParams
from anabranch.request.token import Token, TokenLogprob
from anabranch.sampling.detokenizer import IncrementalDetokenizer, StopStringMatcher
from anabranch_client import Admin, AsyncClient
from orchestrator.served_model import Prompt
from orchestrator.service import Orchestrator
from tests.support.thread_encoder import ThreadEncoder
from tests.support.waiting import WAIT_S, eventually_async
from transport.control import ControlClient

CONTEXT = 1024
VOCAB = 256
EOS = 0
# A sparse layer and a dense one: how many experts, and bytes of each.
EXPERTS = ((4, 10), (1, 20))
ALL_EXPERTS = ((0, 1, 2, 3), (0,))

M = TypeVar("M")


class ByteText:
    def __init__(self, sampling: SamplingParams) -> None:
        self._detokenizer = IncrementalDetokenizer(lambda ids: bytes(ids).decode("utf-8", "replace"))
        self._matcher = StopStringMatcher(sampling.stop)

    def push(self, token_id: int) -> tuple[str, bool]:
        return self._matcher.push(self._detokenizer.push(token_id))

    def finish(self) -> str:
        text, _ = self._matcher.push(self._detokenizer.flush())
        return text + self._matcher.flush()


class ByteModel:
    """A model whose tokens are bytes; encoding waits for `gate`."""

    name = "bytes"
    identity = ModelIdentity(
        model="bytes",
        model_fingerprint="",
        vocab_size=VOCAB,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
    )
    vocab_size = VOCAB
    max_context = CONTEXT
    eos_token_ids = (EOS,)
    has_chat_template = True
    longest_token_chars = None

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        return self.encode(prompt) if isinstance(prompt, str) else self.encode_chat(prompt)

    def encode(self, text: str) -> list[int]:
        assert self.gate.wait(WAIT_S)
        return list(text.encode())

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        if messages[-1][0] != "user":
            raise InvalidRequest("the model's chat template refuses them: no user", "messages")
        return self.encode("".join(f"{role}:{content}\n" for role, content in messages))

    def expert_bytes(self, dtype: str, *, shared: bool) -> tuple[tuple[int, int], ...]:
        assert dtype in ("float32", "bfloat16")
        return EXPERTS

    def text_stream(self, sampling: SamplingParams) -> ByteText:
        return ByteText(sampling)


def worker_info(name: str, role: str, /, **changes: object) -> WorkerInfo:
    info = WorkerInfo(
        name=name,
        role=role,  # type: ignore[arg-type]
        pid=1000 + sum(name.encode()),
        host="here",
        model="bytes",
        model_fingerprint="f1",
        vocab_size=VOCAB,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        kv_dtype="float32",
        max_context=CONTEXT,
        num_blocks=64,
        block_size=16,
        planes=("tcp",),
        device="cpu",
        num_threads=1,
    )
    if role == "ffn":
        own = {"addresses": {"shm": f"/{name}"}, "incarnation": 100 + len(name), "max_context": 0, "num_blocks": 0}
        info = msgspec.structs.replace(info, planes=(), block_size=0, **own)
    return msgspec.structs.replace(info, **changes)


class ScriptedWorker:
    """Speaks a worker's side of the control channel, line by line as the test says."""

    def __init__(self, endpoint: str, info: WorkerInfo, secret: bytes = b"") -> None:
        self.info = info
        self.client = ControlClient(endpoint, ToWorker, secret=secret, name=info.name)
        self.received: list[ToWorker] = []
        self._news = asyncio.Event()
        self._tasks = [asyncio.create_task(self._receive(), name=f"{info.name} receives")]

    async def _receive(self) -> None:
        while True:
            message = await self.client.recv()
            if not isinstance(message, Beat):
                self.received.append(message)
                self._news.set()

    async def register(self) -> Registered:
        await self.client.send(Register(worker=self.info))
        answer = await self.expect(Registered)
        if answer.error is None:
            self._tasks.append(asyncio.create_task(self._beat(), name=f"{self.info.name} beats"))
        return answer

    async def _beat(self) -> None:
        while True:
            await self.beat()
            await asyncio.sleep(0.05)

    async def beat(self, work_age_s: float = 0.0) -> None:
        """Send one beat."""
        stats = WorkerStats(
            num_free_blocks=60,
            num_total_blocks=64,
            num_running=0,
            num_waiting=0,
            num_leases=0,
            queued_tokens=0,
            work_age_s=work_age_s,
        )
        await self.client.send(Beat(stats=stats))

    def fall_silent(self) -> None:
        """Go on living without a sign of it, as a stopped process does."""
        for task in self._tasks[1:]:
            task.cancel()

    async def close(self) -> None:
        """Break the connection, as a killed process does."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.client.close()

    async def expect(self, kind: type[M]) -> M:
        """The next message, which must be of this kind."""
        async with asyncio.timeout(WAIT_S):
            while not self.received:
                self._news.clear()
                await self._news.wait()
        message = self.received.pop(0)
        assert isinstance(message, kind), f"{self.info.name}: {message} where {kind.__name__} was due"
        return message

    async def send(self, message: ToOrchestrator) -> None:
        await self.client.send(message)

    async def reserved(self, request: Request) -> None:
        """Answer a Reserve."""
        layout = KvLayout(dtype="float32", num_layers=1, num_kv_heads=1, head_dim=8, block_size=16)
        destination = KvDestination(
            worker=self.info.name,
            stream_id=7,
            generation=3,
            layout=layout,
            addresses=({"tcp": "127.0.0.1:9"},),
            block_ids=(1, 2),
            num_cached_tokens=0,
            num_tokens=len(request.token_ids),
            lease_s=10.0,
        )
        await self.send(Reserved(request_id=request.request_id, epoch=request.epoch, destination=destination))

    async def tokens(
        self, request: Request, text: str | Sequence[int], first: int, logprob: TokenLogprob | None = None
    ) -> None:
        """Send tokens of one step each."""
        ids = list(text.encode()) if isinstance(text, str) else list(text)
        for offset, token_id in enumerate(ids):
            token = Token(
                request_id=request.request_id,
                epoch=request.epoch,
                index=first + offset,
                token_id=token_id,
                logprob=logprob,
            )
            await self.send(Tokens(tokens=(token,)))

    async def ended(self, request: Request, reason: EndReason, error: WireError | None = None, **more: float) -> None:
        ended = Ended(request_id=request.request_id, epoch=request.epoch, reason=reason, error=error)
        await self.send(msgspec.structs.replace(ended, **more))

    async def prefill_ended(self, request: Request, error: WireError | None = None) -> None:
        """Report a prompt computed in 0.5 s after 0.25 s, whose KV took 0.4 s, a quarter of it exposed."""
        kv = KvStreamStats(payload_bytes=4096, transport="tcp", stream_s=0.4, exposed_s=0.1)
        await self.send(
            PrefillEnded(
                request_id=request.request_id,
                epoch=request.epoch,
                queue_s=0.25,
                prefill_s=0.5,
                num_cached_tokens=2,
                kv=None if error else kv,
                error=error,
            )
        )


class World:
    """What a scenario plays in."""

    def __init__(self, orchestrator: Orchestrator, model: ByteModel, config: OrchestratorConfig) -> None:
        self.orchestrator = orchestrator
        self.model = model
        self.config = config
        self.client = AsyncClient(orchestrator.grpc_endpoint, timeout_s=30.0)
        self._workers: list[ScriptedWorker] = []

    def admin(self, **changes: Any) -> Admin:
        """The operator's client, with the token unless a test says otherwise."""
        settings = {"token_file": self.orchestrator.admin_token_file, **changes}
        return Admin(self.orchestrator.grpc_endpoint, **settings)

    async def worker(self, name: str, role: str, /, **changes: object) -> ScriptedWorker:
        """A registered worker."""
        worker = self.stranger(name, role, **changes)
        answer = await worker.register()
        assert answer.error is None, answer.error
        return worker

    def stranger(self, name: str, role: str, /, **changes: object) -> ScriptedWorker:
        """A connected worker that has said nothing yet."""
        worker = ScriptedWorker(self.orchestrator.control_endpoint, worker_info(name, role, **changes))
        self._workers.append(worker)
        return worker

    async def pair(self) -> tuple[ScriptedWorker, ScriptedWorker]:
        """A registered prefill and decode worker."""
        return await self.worker("prefill-0", "prefill"), await self.worker("decode-0", "decode")

    async def quiet(self) -> None:
        """Wait until nothing is left of any request."""

        def left() -> str:
            try:
                self.orchestrator.check_integrity()
            except AssertionError as error:
                return str(error)
            return ""

        try:
            await eventually_async(lambda: not left())
        except TimeoutError:
            pytest.fail(f"left behind: {left()}")

    async def close(self) -> None:
        await self.client.close()
        for worker in self._workers:
            await worker.close()


Scenario = Callable[[World], Awaitable[None]]

QUICK = {
    "queue_timeout_s": 5.0,
    "reserve_timeout_s": 5.0,
    "prefill_timeout_s": 5.0,
    "token_timeout_s": 5.0,
    "report_timeout_s": 0.5,
    "worker_timeout_s": 1.0,
    "heartbeat_s": 0.1,
    "drain_timeout_s": 2.0,
}


@pytest.fixture
def play(tmp_path) -> Callable[..., None]:
    """Play a scenario, then assert that it left nothing behind: requests, calls, queue, loads, tasks."""

    def run(scenario: Scenario, **changes: object) -> None:
        async def main() -> None:
            settings = {"control_bind": f"ipc://{tmp_path}/control", **QUICK, **changes}
            config = OrchestratorConfig(model="bytes", **settings)  # type: ignore[arg-type]
            model = ByteModel()
            orchestrator = Orchestrator(config, model, ThreadEncoder(model.encode_prompt))
            await orchestrator.start()
            world = World(orchestrator, model, config)
            try:
                await scenario(world)
                await world.quiet()
            finally:
                model.gate.set()
                await world.close()
                await orchestrator.close()
            strays = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            assert not [name for name in strays if name.startswith(("request", "receive", "watch", "health"))], strays

        uvloop.run(main())

    return run


async def prefilling(world: World, prefill: ScriptedWorker, decode: ScriptedWorker) -> Request:
    """Play a request that was just sent up to the order to compute its prompt."""
    reserve = await decode.expect(Reserve)
    await decode.reserved(reserve.request)
    order = await prefill.expect(Prefill)
    assert order.request == reserve.request
    assert order.destination.worker == decode.info.name
    return order.request


@pytest.fixture
def to_prefilling() -> Callable[..., Awaitable[Request]]:
    return prefilling


@pytest.fixture
def wait() -> Callable[..., Awaitable[None]]:
    return eventually_async


@pytest.fixture
def scripted() -> Callable[..., ScriptedWorker]:
    """Makes a connected worker that has said nothing yet."""

    def make(endpoint: str, name: str, role: str, /, **changes: object) -> ScriptedWorker:
        return ScriptedWorker(endpoint, worker_info(name, role, **changes))

    return make


@pytest.fixture
def model() -> ByteModel:
    return ByteModel()
