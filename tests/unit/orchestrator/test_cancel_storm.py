"""Thousands of requests that are cancelled at every stage, among workers that fail and die: nothing is left of them.

The requests' life is the real one, from the queue to the end; the workers are scripted, and the control channel is a
function call.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random

import msgspec
import pytest

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import AnabranchError, RequestCancelled
from anabranch.parallel.layout import KvLayout
from anabranch.protocol.kv import KvDestination
from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import Cancel, Ended, ModelIdentity, Prefill, PrefillEnded, Reserve, Reserved, Tokens
from anabranch.request.request import Request
from anabranch.request.sampling_params import SamplingParams
from anabranch.request.token import Token
from orchestrator.answer import Finished
from orchestrator.client_deadline import ClientDeadline
from orchestrator.dispatcher import Dispatcher
from orchestrator.membership import Membership
from orchestrator.router import LeastWork
from tests.unit.orchestrator.test_router import member

pytestmark = pytest.mark.unit

NUM_REQUESTS = 5000
NUM_AT_ONCE = 100
LENGTH = 24
STAGES = ("queued", "reserved", "prefilling", "decoding", "ending", "never")
LAYOUT = KvLayout(dtype="float32", num_layers=1, num_kv_heads=1, head_dim=8, block_size=16)


class Text:
    def push(self, token_id: int) -> tuple[str, bool]:
        return chr(token_id), False

    def finish(self) -> str:
        return ""


class Model:
    def text_stream(self, sampling: SamplingParams) -> Text:
        return Text()


class Workers:
    """The control channel, and all workers behind it.

    Attributes:
        held: what each worker holds of which attempt, leases among it.
    """

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.held: dict[bytes, set[tuple[str, int]]] = {}
        self.dispatcher: Dispatcher
        self.membership: Membership

    async def send(self, peer: bytes, message: object) -> None:
        held = self.held.setdefault(peer, set())
        if isinstance(message, Reserve | Prefill):
            assert message.request.key not in held
            held.add(message.request.key)
            play = self._decode if isinstance(message, Reserve) else self._prefill
            asyncio.get_running_loop().create_task(play(peer, message.request), name="scripted")
        elif isinstance(message, Cancel) and (message.request_id, message.epoch) in held:
            held.discard((message.request_id, message.epoch))
            if peer.startswith(b"decode"):
                self._say(peer, Ended(request_id=message.request_id, epoch=message.epoch, reason="cancelled"))
            else:
                error = WireError.of(RequestCancelled("as told"))
                self._say(peer, PrefillEnded(request_id=message.request_id, epoch=message.epoch, error=error))

    async def dismiss(self, peer: bytes, message: object) -> None:
        raise AssertionError

    def _say(self, peer: bytes, message: Reserved | Tokens | PrefillEnded | Ended) -> None:
        worker = self.membership._by_peer.get(peer)
        if worker is not None:
            self.dispatcher.deliver(worker, message)

    async def _decode(self, peer: bytes, request: Request) -> None:
        held, dice = self.held[peer], self.dice
        await self._pause()
        destination = KvDestination(
            worker=peer.decode(),
            stream_id=1,
            generation=1,
            layout=LAYOUT,
            addresses=({"tcp": "127.0.0.1:9"},),
            block_ids=(1,),
            num_cached_tokens=0,
            num_tokens=len(request.token_ids),
            lease_s=10.0,
        )
        if request.key in held:
            self._say(peer, Reserved(request_id=request.request_id, epoch=request.epoch, destination=destination))
        for index in range(len(request.output_ids), LENGTH):
            await self._pause()
            if request.key not in held:
                return
            if dice.random() < 0.005:
                held.discard(request.key)
                error = WireError(code="internal", message="no luck")
                self._say(peer, Ended(request_id=request.request_id, epoch=request.epoch, reason="failed", error=error))
                return
            token = Token(request_id=request.request_id, epoch=request.epoch, index=index, token_id=65 + index)
            self._say(peer, Tokens(tokens=(token,)))
        held.discard(request.key)
        self._say(peer, Ended(request_id=request.request_id, epoch=request.epoch, reason="length"))

    async def _prefill(self, peer: bytes, request: Request) -> None:
        await self._pause()
        if request.key in self.held[peer]:
            self.held[peer].discard(request.key)
            self._say(peer, PrefillEnded(request_id=request.request_id, epoch=request.epoch))

    async def _pause(self) -> None:
        for _ in range(self.dice.randrange(3)):
            await asyncio.sleep(0)


async def ask(dispatcher: Dispatcher, number: int, dice: random.Random) -> str:
    """One request, cancelled at a stage by chance; how it ended, once what came was found right."""
    stage = dice.choice(STAGES)
    place = dispatcher.room.enter(10)
    sampling = SamplingParams(max_tokens=LENGTH)
    request = Request(request_id=f"r{number}", epoch=0, prompt_ids=(1, 2, 3), sampling=sampling)
    life = dispatcher.submit(
        request, 0.0, client_id="", place=place, tenant="", priority=0, deadline=ClientDeadline(None)
    )
    wanted = {"queued": 0, "reserved": 1, "prefilling": 3, "decoding": 30, "ending": 60}.get(stage)
    if wanted is not None:
        for _ in range(dice.randrange(wanted + 1)):
            await asyncio.sleep(0)
        life.inbox.stop(RequestCancelled("the client went away"))
    text = ""
    try:
        while True:
            part = await life.answer.next()
            if isinstance(part, Finished):
                assert text == "".join(chr(65 + index) for index in range(LENGTH))
                assert sum(route.num_tokens for route in part.routes) == LENGTH
                return "finished"
            assert part.first_index == len(text)
            text += part.text
    except AnabranchError as error:
        return error.code


def test_a_storm_of_cancels_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    # What pytest keeps of the log would count as left behind.
    caplog.set_level(logging.CRITICAL + 1, "orchestrator")

    async def storm() -> None:
        dice = random.Random(7)
        workers = Workers(dice)
        info = member("x", "decode").info
        served = ModelIdentity(**{field: getattr(info, field) for field in ModelIdentity.__struct_fields__})

        def changed(worker) -> None:
            if worker.end is not None:
                dispatcher.worker_lost(worker, worker.end)
            dispatcher.queue.pump()

        membership = Membership(
            workers,  # type: ignore[arg-type]
            served,
            worker_timeout_s=3.0,
            heartbeat_s=0.5,
            on_change=changed,
        )
        config = OrchestratorConfig(model="m", max_queued=NUM_REQUESTS)
        dispatcher = Dispatcher(config, Model(), LeastWork(60), membership)  # type: ignore[arg-type]
        workers.dispatcher, workers.membership = dispatcher, membership
        incarnation = 0

        async def come(name: str) -> None:
            nonlocal incarnation
            incarnation += 1
            own = member(name, name.partition("-")[0]).info
            own = msgspec.structs.replace(own, pid=incarnation)
            await membership.register(f"{name}.{incarnation}".encode(), own)

        for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
            await come(name)
        fates: list[str] = []
        tasks_before = asyncio.all_tasks()
        num_objects: list[int] = []
        for first in range(0, NUM_REQUESTS, NUM_AT_ONCE):
            asking = [asyncio.create_task(ask(dispatcher, first + n, dice)) for n in range(NUM_AT_ONCE)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            victim = dice.choice(membership.members)
            membership.lose(victim, "killed")
            workers.held.pop(victim.peer, None)
            workers.held[victim.peer] = set()
            await come(victim.name)
            fates += await asyncio.gather(*asking)
            await dispatcher.wait_until_idle()
            while len(asyncio.all_tasks()) > len(tasks_before):
                await asyncio.sleep(0)
            dispatcher.check_integrity()
            assert not any(workers.held.values())
            for worker in membership.members:
                assert (worker.num_requests, worker.num_unproven, worker.held_alone) == (0, 0, 0)
            del workers.held[victim.peer]
            if first in (NUM_REQUESTS // 2, NUM_REQUESTS - NUM_AT_ONCE):
                gc.collect()
                num_objects.append(len(gc.get_objects()))
        counts = {fate: fates.count(fate) for fate in set(fates)}
        assert set(counts) <= {"finished", "cancelled", "recoveries_exhausted"}
        assert counts["finished"] > NUM_REQUESTS / 10
        assert counts["cancelled"] > NUM_REQUESTS / 10
        assert counts.get("recoveries_exhausted", 0) == 0
        # What has grown meanwhile are fates and bounded logs.
        assert num_objects[1] - num_objects[0] < NUM_REQUESTS / 10
        dispatcher.queue.close()

    asyncio.run(storm())
