"""The processes that encode prompts: whatever one prompt does, others are encoded, and everything ends on time."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import psutil
import pytest

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import (
    ChatTemplateError,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    Overloaded,
    PeerLost,
    WorkerDied,
)
from orchestrator.encoding.fork_server import ForkServer
from orchestrator.encoding.pool import SHORT_CHARS, EncoderPool
from tests.support.resources import num_descriptors
from tests.support.waiting import eventually, eventually_async

pytestmark = pytest.mark.distributed

LANES = ("encode-chat", "encode-longchat", "encode-longtext", "encode-text")


@dataclass
class World:
    pool: EncoderPool
    server: psutil.Process

    def encoders(self) -> dict[str, psutil.Process]:
        """Living ones by name."""
        try:
            return {child.name(): child for child in self.server.children() if alive(child)}
        except psutil.NoSuchProcess:  # it has ended, or one of them meanwhile
            return {}


@asynccontextmanager
async def running(**changes: object) -> AsyncIterator[World]:
    """A pool over scripted encoders; afterwards nothing is left of it."""
    num_before = num_descriptors()
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", "tests.support.scripted_fork_server", str(theirs.fileno())], pass_fds=(theirs.fileno(),)
    )
    theirs.close()
    try:
        config = OrchestratorConfig(model="bytes", **{"encode_timeout_s": 60.0, **changes})  # type: ignore[arg-type]
        world = World(EncoderPool(config, ForkServer(process.pid, ours)), psutil.Process(process.pid))
        await world.pool.start()
        await eventually_async(lambda: tuple(sorted(world.encoders())) == LANES)
        encoders = world.encoders()
        try:
            yield world
        finally:
            encoders |= world.encoders()
            await world.pool.close()
        await eventually_async(lambda: not any(alive(encoder) for encoder in encoders.values()))
        # Fewer, where what an earlier test left is collected meanwhile.
        await eventually_async(lambda: num_descriptors() <= num_before)
        assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    finally:
        process.kill()
        process.wait()


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def chat(text: str) -> list[tuple[str, str]]:
    return [("user", text)]


def long(prompt: str) -> list[tuple[str, str]]:
    """A chat of the long lane that does what `prompt` says."""
    return [("user", prompt), ("user", "x" * SHORT_CHARS)]


def test_prompts_become_ids_and_a_refusal_ends_nothing():
    async def main() -> None:
        async with running() as world:
            before = {name: process.pid for name, process in world.encoders().items()}
            assert await world.pool.encode("aé") == [97, 195, 169]
            assert await world.pool.encode(chat("b")) == [98]
            assert await world.pool.encode("x" * 1_000_000) == [120] * 1_000_000
            assert len(await world.pool.encode(long("c"))) == 1
            for prompt in ("refuse", chat("refuse")):
                with pytest.raises(InvalidRequest, match="text: refused"):
                    await world.pool.encode(prompt)
            assert {name: process.pid for name, process in world.encoders().items()} == before

    asyncio.run(main())


@pytest.mark.parametrize("how", ["hang", "hang-native"])
def test_what_hangs_holds_up_its_own_lane_alone(how):
    async def main() -> None:
        async with running() as world:
            hanging = asyncio.create_task(world.pool.encode(chat(how)))
            behind = asyncio.create_task(world.pool.encode(chat("behind")))
            await eventually_async(lambda: world.encoders()["encode-chat"].cpu_times().user > 0.05)
            # By order of events: these end while the first is still at it.
            assert await world.pool.encode("text") == list(b"text")
            assert len(await world.pool.encode("x" * (SHORT_CHARS + 1))) == SHORT_CHARS + 1
            assert await world.pool.encode(long("c")) == [99]
            assert not hanging.done() and not behind.done()
            hanging.cancel(), behind.cancel()
            await asyncio.gather(hanging, behind, return_exceptions=True)
            # Closing waits for nobody: `running` checks that the process is gone.

    asyncio.run(main())


def test_a_long_text_delays_no_short_one_and_no_short_one_overtakes_another(tmp_path):
    async def main() -> None:
        async with running() as world:
            order: list[str] = []

            async def ask(name: str, prompt: object) -> None:
                await world.pool.encode(prompt)  # type: ignore[arg-type]
                order.append(name)

            async with asyncio.TaskGroup() as group:
                group.create_task(ask("long", long(f"wait {tmp_path}/go")))
                for number in range(5):
                    group.create_task(ask(f"{number}", "hello"))
                await eventually_async(lambda: len(order) == 5)
                (tmp_path / "go").touch()
            assert order == ["0", "1", "2", "3", "4", "long"]

    asyncio.run(main())


def test_what_takes_too_long_is_ended_by_name_and_the_lane_goes_on(caplog):
    cases = (
        ("hang", DeadlineExceeded, "encode_timeout_s: the prompt was not tokenised within 1 s"),
        (chat("hang"), ChatTemplateError, r"chat template was not done after 1 s \(encode_timeout_s\)"),
        (chat("hang-native"), ChatTemplateError, "chat template was not done"),
        (chat("rendered:hang"), DeadlineExceeded, "encode_timeout_s: the prompt was not tokenised"),
    )

    async def main() -> None:
        async with running(encode_timeout_s=1.0) as world:
            for prompt, error, says in cases:
                before = world.encoders()
                with pytest.raises(error, match=says):
                    await world.pool.encode(prompt)
                lane = "text" if isinstance(prompt, str) else "chat"
                assert await world.pool.encode("again" if lane == "text" else chat("again")) == list(b"again")
                after = world.encoders()
                assert [name for name in LANES if after[name].pid != before[name].pid] == [f"encode-{lane}"]

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    lines = [record for record in caplog.records if record.name.startswith("orchestrator")]
    assert len(lines) == len(cases)
    assert all(line.exc_info is None and "is not encoded" in line.message for line in lines)


def test_what_ends_its_process_is_named_and_the_lane_goes_on():
    async def main() -> None:
        async with running() as world:
            for prompt, error, says in (
                ("grow", WorkerDied, r"the process that tokenised the prompt ended \(exit status 1\)"),
                (chat("grow"), ChatTemplateError, r"chat template ended the process that renders it \(exit status 1\)"),
                ("die", WorkerDied, "exit status 7"),
                (chat("rendered:die"), WorkerDied, "exit status 7"),
            ):
                with pytest.raises(error, match=says):
                    await world.pool.encode(prompt)
                assert await world.pool.encode("again" if isinstance(prompt, str) else chat("again")) == list(b"again")

    asyncio.run(main())


def test_an_encoder_that_is_killed_is_replaced(tmp_path):
    async def main() -> None:
        async with running() as world:
            world.encoders()["encode-chat"].kill()
            asking = asyncio.create_task(world.pool.encode(f"wait {tmp_path}/never"))
            await asyncio.sleep(0)
            await eventually_async(lambda: not world.pool._text._queue)
            world.encoders()["encode-text"].kill()
            with pytest.raises(WorkerDied, match="killed by SIGKILL"):
                await asking
            assert await world.pool.encode("again") == list(b"again")
            # It ended while it had nothing to do: no prompt is lost.
            assert await world.pool.encode(chat("again")) == list(b"again")

    asyncio.run(main())


def test_a_caller_that_goes_away_leaves_the_queue(tmp_path):
    async def main() -> None:
        async with running() as world:
            first = asyncio.create_task(world.pool.encode(f"wait {tmp_path}/go"))
            second = asyncio.create_task(world.pool.encode("die"))
            third = asyncio.create_task(world.pool.encode("third"))
            await asyncio.sleep(0)
            second.cancel()
            first.cancel()
            await asyncio.wait({first, second})
            assert first.cancelled() and second.cancelled()
            (tmp_path / "go").touch()
            # What was begun for the first is not taken for an answer to the third; the second is never begun.
            assert await third == list(b"third")

    asyncio.run(main())


def test_the_queue_is_bounded_in_characters_and_in_time(tmp_path):
    async def main() -> None:
        async with running(max_prompt_chars=100, queue_timeout_s=0.3) as world:
            first = asyncio.create_task(world.pool.encode(f"wait {tmp_path}/go"))
            await asyncio.sleep(0)
            await eventually_async(lambda: not world.pool._text._queue)
            waiting = [asyncio.create_task(world.pool.encode("x" * 100)) for _ in range(8)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="prompts of 800 characters wait to be tokenised already"):
                await world.pool.encode("x")
            for task in waiting:
                with pytest.raises(DeadlineExceeded, match="queue_timeout_s: no process was free"):
                    await task
            (tmp_path / "go").touch()
            assert await first == [1]
            assert await world.pool.encode("x") == [120]

    asyncio.run(main())


def test_prompts_that_wait_end_when_the_pool_closes(tmp_path):
    async def main() -> None:
        async with running() as world:
            first = asyncio.create_task(world.pool.encode("hang"))
            waiting = asyncio.create_task(world.pool.encode("x"))
            # The first is at the encoder.
            await eventually_async(lambda: len(world.pool._text._queue) == 1)
            await world.pool.close()
            with pytest.raises(Draining):
                await waiting
            with pytest.raises(asyncio.CancelledError):
                await first

    asyncio.run(main())


def test_without_the_fork_server_every_encoder_ends_and_the_pool_says_so():
    async def main() -> None:
        async with running() as world:
            watching = asyncio.create_task(world.pool.run())
            asking = asyncio.create_task(world.pool.encode("hang"))
            encoders = world.encoders()
            await eventually_async(lambda: encoders["encode-text"].cpu_times().user > 0.02)
            world.server.kill()
            # The busy one reads no connection: the kernel ends it.
            await eventually_async(lambda: not any(alive(encoder) for encoder in encoders.values()))
            with pytest.raises(PeerLost, match="the process that starts encoders has ended"):
                await watching
            with pytest.raises(WorkerDied):
                await asking

    asyncio.run(main())


def test_nothing_is_left_of_an_orchestrator_that_is_killed_while_it_encodes():
    def busy() -> bool:
        return any(
            child.name() == "encode-chat" and child.cpu_times().user > 0.02 for child in parent.children(recursive=True)
        )

    with subprocess.Popen([sys.executable, "-m", "tests.support.scripted_fork_server"]) as process:
        try:
            parent = psutil.Process(process.pid)
            eventually(busy)
            left = parent.children(recursive=True)
        finally:
            process.kill()
    assert len(left) == 1 + len(LANES)
    eventually(lambda: not any(alive(child) for child in left))


def test_encoders_take_no_notice_of_signals_that_drain():
    async def main() -> None:
        async with running() as world:
            pids = {name: process.pid for name, process in world.encoders().items()}
            for pid in (world.server.pid, *pids.values()):
                os.kill(pid, signal.SIGINT)
                os.kill(pid, signal.SIGTERM)
            assert await world.pool.encode("x") == [120]
            assert {name: process.pid for name, process in world.encoders().items()} == pids

    asyncio.run(main())
