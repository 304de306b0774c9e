"""KV slices that no honest worker sends, to a decode worker's tensor plane.

A prefill worker that has registered as it should takes orders and answers each with slices of its own: of the order's
stream, which are mutated, and of streams that do not exist. It never sends what an order asks for, so each of its
requests must end with a named error, and nothing of it may stay. Strangers without the plane's token come after it.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from anabranch.errors import MalformedMessage, TransportError
from anabranch.protocol.kv import KvDestination
from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import (
    Beat,
    Message,
    Prefill,
    PrefillEnded,
    Register,
    Registered,
    ToWorker,
    WorkerInfo,
    WorkerStats,
)
from anabranch_client import AsyncClient, ClientError, Sampling
from benchmarks.attack.fuzz import mutated
from benchmarks.attack.probe import Probe
from benchmarks.attack.slice_maker import SliceMaker
from benchmarks.attack.tally import Tally
from transport.control import ControlClient
from transport.kv_stream.messages import decode_to_sender
from transport.planes import Link, create_plane
from transport.planes.handshake import Introduction, parse_address
from transport.planes.handshake import encode as encode_hello
from transport.planes.tcp import KIND, SCHEME

NAME = "prefill-hostile"
NUM_PER_ORDER = 50
NUM_VICTIMS = 6
CONNECT_TIMEOUT_S = 5.0
BEAT_S = 0.5
CLOSE_TIMEOUT_S = 15.0
REGISTER_TIMEOUT_S = 10.0
VICTIM_TIMEOUT_S = 60.0
HUNG = "hung"
_NO_LOAD = WorkerStats(
    num_free_blocks=64, num_total_blocks=64, num_running=0, num_waiting=0, num_leases=0, queued_tokens=0
)


class _Ear:
    """Hears what a plane brings back; counts are read when all is over."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.lost = threading.Event()

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None:
        error = decode_to_sender(header).error
        self.ends[f"ack.{error.code if error is not None else 'ACCEPTED'}"] += 1
        return None

    def on_payload(self, link: Link, header: bytes, buffer: memoryview) -> None:
        """No payload comes back."""

    def on_lost(self, link: Link, error: Exception) -> None:
        self.ends["link.ended"] += 1
        self.lost.set()


class HostilePrefill:
    """A prefill worker that takes orders and spoils them.

    Args:
        info: what it registers as.

    Attributes:
        destination: of its latest order; None: it had none yet.
        num_sent: messages that it has posted.
    """

    def __init__(self, control: str, secret: bytes, seed: int, info: WorkerInfo, tally: Tally) -> None:
        self._control = ControlClient(control, ToWorker, secret=secret, name=NAME)
        self._rng = random.Random(f"{seed}/slices")
        self._info = info
        self._tally = tally
        self._ear = _Ear()
        self._plane = create_plane(SCHEME, self._ear)
        self._link: Link | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hostile")
        self._tasks: list[asyncio.Task[None]] = []
        self.destination: KvDestination | None = None
        self.num_sent = 0

    async def start(self) -> None:
        """Register. Raises AnabranchError where the orchestrator refuses, TimeoutError where it says nothing."""
        await self._control.send(Register(worker=self._info))
        async with asyncio.timeout(REGISTER_TIMEOUT_S):
            while not isinstance(answer := await self._control.recv(), Registered):
                pass
        if answer.error is not None:
            raise answer.error.to_error()
        self._tasks = [asyncio.create_task(self._obey()), asyncio.create_task(self._beat())]

    def check(self) -> None:
        """Raise what has ended it, if it has ended."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._control.close()
        self._pool.shutdown()
        self._plane.close()
        for end, number in self._ear.ends.items():
            self._tally.count("slices", end, number)

    async def _beat(self) -> None:
        while True:
            await self._control.send(Beat(stats=_NO_LOAD))
            await asyncio.sleep(BEAT_S)

    async def _obey(self) -> None:
        while True:
            message: Message = await self._control.recv()
            if isinstance(message, Registered) and message.error is not None:
                raise message.error.to_error()
            if isinstance(message, Prefill):
                self.destination = message.destination
                await asyncio.get_running_loop().run_in_executor(self._pool, self._spoil, message.destination)
                error = WireError.of(MalformedMessage("a hostile worker took this request"))
                request = message.request
                await self._control.send(PrefillEnded(request_id=request.request_id, epoch=request.epoch, error=error))

    def _spoil(self, destination: KvDestination) -> None:
        maker = SliceMaker(self._rng, destination)
        for _ in range(NUM_PER_ORDER):
            header, payload = maker.make()
            try:
                if self._link is None or self._ear.lost.is_set():
                    self._ear.lost.clear()
                    self._link = self._plane.connect(destination.addresses[0][SCHEME], CONNECT_TIMEOUT_S)
                self._link.send(header, memoryview(payload) if payload else None).result(CONNECT_TIMEOUT_S)
                self._tally.count("slices", "sent")
            except TransportError as error:
                self._tally.count("slices", f"send.{error.code}")
            except TimeoutError:
                self._tally.count("slices", HUNG)
            self.num_sent += 1


async def attack(
    endpoint: str,
    control: str,
    secret: bytes,
    seed: int,
    info: WorkerInfo,
    num_messages: int,
    probe: Probe,
    tally: Tally,
) -> None:
    """Send so many messages, a fifth of them as strangers to the plane; counted as `slices` and `victims`.

    Raises:
        AnabranchError, TimeoutError: the hostile worker was not let in, or was given no order.
    """
    hostile = HostilePrefill(control, secret, seed, info, tally)
    num_strange = num_messages // 5
    try:
        await hostile.start()
        async with AsyncClient(endpoint) as client, asyncio.timeout(VICTIM_TIMEOUT_S * 10):
            while hostile.num_sent < num_messages - num_strange:
                hostile.check()
                await asyncio.gather(*(_victim(client, probe, tally) for _ in range(NUM_VICTIMS)))
        assert hostile.destination is not None
        await _strangers(hostile.destination.addresses[0][SCHEME], seed, num_strange, tally)
    finally:
        await hostile.close()


async def _victim(client: AsyncClient, probe: Probe, tally: Tally) -> None:
    """A request that the hostile worker may get: a right answer, or a named error."""
    prompt = probe.prompts[tally.total("victims") % len(probe.prompts)]
    sampling = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
    try:
        answer = await client.complete(prompt, sampling, timeout_s=VICTIM_TIMEOUT_S)
        probe.judge(prompt, answer.token_ids)
        tally.count("victims", "OK")
    except ClientError as error:
        tally.count("victims", error.code)


async def _strangers(address: str, seed: int, number: int, tally: Tally) -> None:
    """Hellos with wrong tokens, mutated hellos and garbage; each connection must be closed."""
    rng = random.Random(f"{seed}/slices/strangers")
    host, port, _ = parse_address(SCHEME, address)
    hello = encode_hello(KIND, rng.randbytes(16), Introduction(name="stranger"))
    at_once = asyncio.Semaphore(8)

    async def call(data: bytes) -> None:
        async with at_once:
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(data)
                writer.write_eof()
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    came = await reader.read()
                tally.count("slices", "stranger.WELCOME" if came else "stranger.closed")
            except OSError:
                tally.count("slices", "stranger.closed")
            except TimeoutError:
                tally.count("slices", HUNG)
            finally:
                writer.transport.abort()

    said = [rng.choice((hello, mutated(rng, hello), rng.randbytes(rng.choice((1, 28, 5000))))) for _ in range(number)]
    await asyncio.gather(*(call(data) for data in said))
