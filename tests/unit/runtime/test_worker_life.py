"""A worker's life, with a room that computes nothing: registration, beats, silence, failure, drain, the end."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from anabranch.config.worker import WorkerConfig
from anabranch.engine.activity import Activity
from anabranch.engine.faults import MAX_IN_A_ROW
from anabranch.errors import (
    AccessDenied,
    AnabranchError,
    CheckpointError,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    WorkerDied,
)
from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import (
    Beat,
    Cancel,
    Drain,
    Ended,
    Failing,
    Generate,
    Message,
    Registered,
    Reserve,
    Shutdown,
    WorkerInfo,
    WorkerStats,
)
from anabranch.system.private_files import write_secret
from runtime.outbox import MAX_MESSAGES
from runtime.worker import Worker, unexpected
from tests.support.resources import our_threads
from tests.support.scripted import ScriptedOrchestrator, play, request
from tests.support.waiting import WAIT_S, eventually, eventually_async

pytestmark = pytest.mark.unit


class Room(Worker):
    """Holds requests until they are cancelled."""

    build_error: Exception | None = None

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        self.held: set[tuple[str, int]] = set()
        self.num_ticks = 0
        self.num_closes = 0
        self.built_on = ""

    def build(self) -> WorkerInfo:
        self.built_on = threading.current_thread().name
        if self.build_error is not None:
            raise self.build_error
        self.compute = Activity("the compute thread")
        self.start_engine(lambda: self.step(), self.compute)
        return WorkerInfo(
            name=self.config.name,
            role="colocated",
            pid=1,
            host="here",
            model="m",
            model_fingerprint="f",
            vocab_size=10,
            hidden_size=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            kv_dtype="float32",
            max_context=10,
            num_blocks=7,
            block_size=1,
            planes=(),
            device="cpu",
            num_threads=1,
        )

    def step(self) -> bool:
        return False

    def handle(self, message: Message) -> None:
        match message:
            case Generate(request=item):
                if item.prompt_ids == (9,):
                    raise InvalidRequest("is nine", "prompt_ids")
                self.submit(lambda: self.held.add(item.key))
            case Cancel(request_id=request_id, epoch=epoch):
                self.submit(lambda: self._end((request_id, epoch)))
            case _:
                raise unexpected(message, "colocated")

    def _end(self, key: tuple[str, int], error: AnabranchError | None = None) -> None:
        self.held.discard(key)
        wire = None if error is None else WireError.of(error)
        self.post(Ended(request_id=key[0], epoch=key[1], reason="failed" if error else "cancelled", error=wire))

    def stats(self) -> WorkerStats:
        return WorkerStats(
            num_free_blocks=7,
            num_total_blocks=7,
            num_running=len(self.held),
            num_waiting=0,
            num_leases=0,
            queued_tokens=0,
        )

    def is_idle(self) -> bool:
        return not self.held

    def tick(self) -> None:
        self.num_ticks += 1

    def close(self) -> None:
        self.num_closes += 1
        self.stop_engine()

    def abandon(self, error: AnabranchError) -> None:
        for key in tuple(self.held):
            self._end(key, error)


Act = Callable[[ScriptedOrchestrator, Room], Awaitable[None]]


@pytest.fixture
def with_room(tmp_path: Path) -> Callable[..., None]:
    """`with_room(act, **options)`: a room that has sent Register; afterwards it is closed once, without a thread."""

    def run(act: Act, **options: object) -> None:
        async def scenario() -> None:
            async with ScriptedOrchestrator(tmp_path, "m", "colocated", Room, **options) as orchestrator:
                room = orchestrator.worker
                assert isinstance(room, Room)
                await act(orchestrator, room)
            assert room.num_closes == 1
            assert not our_threads()

        play(scenario)

    return run


@pytest.fixture
def patient_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, what a worker says before its farewell takes longer than the farewell's own time."""
    monkeypatch.setattr("runtime.worker.FAREWELL_TIMEOUT_S", WAIT_S)


async def ended(orchestrator: ScriptedOrchestrator) -> None:
    """Wait for the worker's end, and pass on what it raised."""
    async with asyncio.timeout(WAIT_S):
        await orchestrator.run


def test_it_serves_and_beats_with_its_load(with_room) -> None:
    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        assert orchestrator.info.num_blocks == 7
        assert room.built_on != threading.main_thread().name
        await orchestrator.accept()
        await orchestrator.send(Generate(request=request((1,), 2)))
        await eventually_async(lambda: room.held == {("a", 0)})
        await orchestrator.send(Cancel(request_id="a", epoch=0))
        message = await orchestrator.expect(Ended)
        assert (message.request_id, message.reason) == ("a", "cancelled")
        assert orchestrator.beats
        assert orchestrator.beats[-1].stats is not None
        assert orchestrator.beats[-1].stats.num_total_blocks == 7

    with_room(act)


def test_what_a_room_refuses_ends_nothing(with_room, caplog) -> None:
    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        await orchestrator.accept()
        await orchestrator.send(Generate(request=request((9,), 2)))
        await orchestrator.send(Reserve(request=request((1,), 2)))
        await orchestrator.send(Generate(request=request((1,), 2, "b")))
        await eventually_async(lambda: room.held == {("b", 0)})
        assert "Generate: prompt_ids: is nine" in caplog.text
        assert "Reserve: a colocated worker takes no Reserve" in caplog.text

    with_room(act)


def test_posts_leave_in_their_order_from_every_thread(with_room) -> None:
    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        await orchestrator.accept()

        def post(thread: int) -> None:
            for number in range(200):
                room.post(Ended(request_id=str(thread), epoch=number, reason="stop"))

        await asyncio.gather(*(asyncio.to_thread(post, thread) for thread in range(4)))
        seen: dict[str, list[int]] = {}
        for _ in range(800):
            message = await orchestrator.expect(Ended)
            seen.setdefault(message.request_id, []).append(message.epoch)
        assert seen == {str(thread): list(range(200)) for thread in range(4)}

    with_room(act)


def test_a_refusal_ends_it(with_room) -> None:
    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        error = ConfigError("name", "x", "is taken")
        await orchestrator.send(Registered(error=WireError.of(error)))
        with pytest.raises(WorkerDied, match="refused by the orchestrator: name: 'x': is taken"):
            await ended(orchestrator)

    with_room(act)


def test_being_fenced_later_ends_it(with_room) -> None:
    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        await orchestrator.accept()
        await orchestrator.accept()  # a second answer without an error changes nothing
        await eventually_async(lambda: orchestrator.beats or room.num_ticks)
        await orchestrator.send(Registered(error=WireError.of(WorkerDied("it counts as dead"))))
        with pytest.raises(WorkerDied, match="it counts as dead"):
            await ended(orchestrator)

    with_room(act)


def test_no_answer_to_the_registration(with_room) -> None:
    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        with pytest.raises(DeadlineExceeded, match=r"orchestrator_timeout_s: .* not answer the registration in 0\.3"):
            await ended(orchestrator)

    with_room(act, orchestrator_timeout_s=0.3)


def test_an_orchestrator_that_falls_silent(with_room) -> None:
    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        await orchestrator.accept()
        for _ in range(6):  # beats keep it alive beyond its timeout
            await asyncio.sleep(0.1)
            await orchestrator.send(Beat())
        assert not orchestrator.run.done()
        with pytest.raises(WorkerDied, match=r"orchestrator_timeout_s: silence for \d+\.\d s from ipc://"):
            await ended(orchestrator)
        assert room.num_ticks > 0

    with_room(act, orchestrator_timeout_s=0.4)


def test_shutdown_ends_it_at_once(with_room) -> None:
    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        await orchestrator.accept()
        await orchestrator.send(Generate(request=request((1,), 2)))
        await eventually_async(lambda: room.held)
        await orchestrator.send(Shutdown())
        await ended(orchestrator)

    with_room(act)


def test_drain_waits_for_what_is_held(with_room) -> None:
    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        await orchestrator.accept()
        await orchestrator.send(Generate(request=request((1,), 2)))
        await eventually_async(lambda: room.held)
        await orchestrator.send(Drain())
        await eventually_async(lambda: room.draining)
        ticks = room.num_ticks
        await eventually_async(lambda: room.num_ticks > ticks + 1)
        assert not orchestrator.run.done()
        await orchestrator.send(Cancel(request_id="a", epoch=0))
        assert (await orchestrator.expect(Ended)).reason == "cancelled"
        await ended(orchestrator)

    with_room(act)


def test_a_failure_ends_its_requests_and_then_the_worker(with_room, patient_farewell) -> None:
    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        await orchestrator.accept()
        for name in "ab":
            await orchestrator.send(Generate(request=request((1,), 2, name)))
        await eventually_async(lambda: len(room.held) == 2)
        await asyncio.to_thread(room.fail, WorkerDied("rank 1 was killed"))
        await asyncio.to_thread(room.fail, WorkerDied("rank 2 was killed"))
        for _ in range(2):
            message = await orchestrator.expect(Ended)
            assert message.error == WireError(code="worker_died", message="rank 1 was killed")
        with pytest.raises(WorkerDied, match="rank 1 was killed"):
            await ended(orchestrator)

    with_room(act)


def test_a_failure_is_no_drain(with_room, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it looks whether it has drained: a worker that fails ends with its error."""
    monkeypatch.setattr("runtime.worker.TICK_S", 0.0005)

    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        await orchestrator.accept()
        await orchestrator.send(Generate(request=request((1,), 2)))
        await eventually_async(lambda: room.held)
        await asyncio.to_thread(room.fail, WorkerDied("rank 1 was killed"))
        with pytest.raises(WorkerDied, match="rank 1 was killed"):
            await ended(orchestrator)

    with_room(act)


def test_a_compute_thread_that_hangs_ends_the_worker_by_name(with_room, patient_farewell) -> None:
    """One rank: nobody waits for it in a collective, and beats go on."""

    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        await orchestrator.accept()
        await orchestrator.send(Generate(request=request((1,), 2)))
        await eventually_async(lambda: room.held)
        room.compute.begin()
        reason = r"step_stall_s: the compute thread has been at one thing for \d+\.\d s, longer than 0\.5 s; .*"
        message = await orchestrator.expect(Ended)
        assert message.error is not None
        assert re.fullmatch(reason, message.error.message)
        last = await orchestrator.expect(Failing)
        assert last.error == message.error
        with pytest.raises(WorkerDied, match=reason):
            await ended(orchestrator)
        ages = [beat.stats.work_age_s for beat in orchestrator.beats if beat.stats is not None]
        assert max(ages) > 0.3
        assert ages[0] == 0.0

    with_room(act, step_stall_s=0.5)


def test_an_engine_that_hangs_ends_the_worker_by_name(with_room) -> None:
    """Its requests cannot be ended one by one, for that is the engine's to do: the last message ends them."""
    go_on = threading.Event()

    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        await orchestrator.accept()
        await orchestrator.send(Generate(request=request((1,), 2)))
        await eventually_async(lambda: room.held)
        room.submit(lambda: go_on.wait(WAIT_S))  # type: ignore[arg-type,return-value]
        reason = "step_stall_s: the engine's thread has been at one thing for "
        last = await orchestrator.expect(Failing)
        assert last.error.message.startswith(reason)
        go_on.set()
        with pytest.raises(WorkerDied, match=reason):
            await ended(orchestrator)

    with_room(act, step_stall_s=0.5)


def test_an_event_loop_that_hangs_ends_the_process(with_room, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    codes: list[int] = []
    monkeypatch.setattr("runtime.worker.os._exit", codes.append)

    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        await orchestrator.accept()
        await eventually_async(lambda: room.num_ticks)
        eventually(lambda: codes, "the end of the process")  # this holds the loop up
        assert codes == [1]
        assert "step_stall_s: the event loop has been at one thing for " in caplog.text

    with_room(act, step_stall_s=0.5)


def test_work_that_goes_on_is_no_stall(with_room) -> None:
    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        await orchestrator.accept()
        for _ in range(10):
            room.compute.begin()
            await asyncio.sleep(0.1)
            room.compute.end()
        assert not orchestrator.run.done()
        await orchestrator.send(Generate(request=request((1,), 2)))
        await eventually_async(lambda: room.held)
        await orchestrator.send(Cancel(request_id="a", epoch=0))
        await orchestrator.expect(Ended)
        stats = orchestrator.beats[-1].stats
        assert stats is not None
        assert stats.num_done >= 10

    with_room(act, step_stall_s=0.5)


def test_steps_that_all_raise_end_the_worker_by_name(with_room, caplog, patient_farewell) -> None:
    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        await orchestrator.accept()
        await orchestrator.send(Generate(request=request((1,), 2)))
        await eventually_async(lambda: room.held)
        for _ in range(2 * MAX_IN_A_ROW):
            room.submit(lambda: room.step_failed(1, InvalidRequest("has a name", "x")))
        for number in range(4 * MAX_IN_A_ROW):
            room.submit(room.step_passed if number % MAX_IN_A_ROW == 0 else lambda: room.step_failed(2, fault))
        for _ in range(MAX_IN_A_ROW):
            room.submit(lambda: room.step_failed(3, fault))
        message = await orchestrator.expect(Ended)
        assert message.error is not None
        assert message.error.message == "every step fails, at last with ZeroDivisionError: always"
        await orchestrator.expect(Failing)
        with pytest.raises(WorkerDied, match="every step fails"):
            await ended(orchestrator)
        said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("a step: ")]
        assert said == [
            "a step: InvalidRequest: x: has a name",
            "a step: InvalidRequest: x: has a name (10 times)",
            "a step: ZeroDivisionError: always",
            "a step: ZeroDivisionError: always (10 times)",
        ]

    fault = ZeroDivisionError("always")
    with_room(act)


def test_a_scheduler_that_always_raises_ends_the_worker_by_name(with_room, patient_farewell) -> None:
    def fail() -> bool:
        raise KeyError("lost")

    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        await orchestrator.accept()
        room.step = fail  # type: ignore[method-assign]
        await orchestrator.send(Generate(request=request((1,), 2)))
        message = await orchestrator.expect(Ended)
        assert message.error is not None
        assert message.error.message == "every step fails, at last with KeyError: 'lost'"
        with pytest.raises(WorkerDied, match="every step fails"):
            await ended(orchestrator)

    with_room(act)


@pytest.mark.parametrize("what", ["messages to the orchestrator", "commands to the engine"])
def test_what_piles_up_ends_the_worker_by_name(
    with_room, patient_farewell, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr("runtime.worker.MAX_WAITING_COMMANDS", 20)
    go_on = threading.Event()

    async def act(orchestrator: ScriptedOrchestrator, room: Room) -> None:
        await orchestrator.accept()
        # The loop comes to none of it in between.
        if what == "messages to the orchestrator":
            for _ in range(MAX_MESSAGES + 1):
                room.post(Ended(request_id="a", epoch=0, reason="stop"))
            error = f"{MAX_MESSAGES} messages of \\d+ bytes wait to be sent"
        else:
            room.submit(lambda: go_on.wait(WAIT_S))  # type: ignore[arg-type,return-value]
            for _ in range(22):
                room.submit(lambda: None)
            error = "the engine has not come to 20 commands that wait for it"
        while not isinstance(last := (await orchestrator.next())[1], Failing):
            assert isinstance(last, Ended)
        assert re.search(error, last.error.message)
        go_on.set()
        with pytest.raises(WorkerDied, match=error):
            await ended(orchestrator)

    with_room(act)


def test_a_build_that_fails_is_closed_and_never_registers(tmp_path: Path) -> None:
    async def scenario() -> None:
        orchestrator = ScriptedOrchestrator(tmp_path, "m", "colocated", Room)
        room = orchestrator.worker
        assert isinstance(room, Room)
        room.build_error = CheckpointError("model.safetensors: cut short")
        with pytest.raises(CheckpointError, match="cut short"):
            await room.run()
        assert room.num_closes == 1
        await orchestrator._server.close()

    play(scenario)


def test_one_that_knows_another_secret_ends_and_says_what_to_give(tmp_path: Path) -> None:
    async def scenario() -> None:
        secret_file = str(write_secret(tmp_path / "secret"))
        orchestrator = ScriptedOrchestrator(tmp_path, "m", "colocated", Room, secret_file=secret_file)
        await orchestrator._server.start()
        with pytest.raises(AccessDenied, match="give the orchestrator and all workers the same secret_file"):
            await orchestrator.worker.run()
        assert orchestrator.worker.num_closes == 1  # type: ignore[attr-defined]
        await orchestrator._server.close()
        os.chmod(secret_file, 0o644)
        room = Room(orchestrator.config)
        with pytest.raises(ConfigError, match=r"secret_file: .* chmod 600 it"):
            await room.run()
        assert room.num_closes == 0  # nothing was built

    play(scenario)


def test_one_that_is_cancelled_while_it_builds_leaves_nothing(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class SlowRoom(Room):
        def build(self) -> WorkerInfo:
            begun.set()
            assert go_on.wait(WAIT_S)
            return super().build()

    async def scenario() -> None:
        room = SlowRoom(
            WorkerConfig(role="colocated", name="w", orchestrator=f"ipc://{tmp_path}/none", model="m", kv_cache_bytes=1)
        )
        run = asyncio.create_task(room.run())
        await eventually_async(begun.is_set)
        run.cancel()
        asyncio.get_running_loop().call_later(0.2, go_on.set)  # long enough to be closed too early
        with pytest.raises(asyncio.CancelledError):
            await run
        assert room.num_closes == 1

    play(scenario)
    assert not our_threads()
