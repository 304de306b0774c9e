"""Processes that are stopped and go on, and processes that are killed: whoever is left serves on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator, Sequence

import psutil

from benchmarks.attack.probe import Probe
from benchmarks.attack.tally import Tally
from launch.cluster import LocalCluster

# Less than the silence after which a worker counts as dead.
SHORT_FREEZE_S = 0.7
# Longer than any process waits for another.
LONG_FREEZE_S = 4.0
NUM_IN_FLIGHT = 8
DEATH_TIMEOUT_S = 10.0


@contextlib.contextmanager
def _stopped(pids: Sequence[int]) -> Iterator[None]:
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


async def freeze(cluster: LocalCluster, probe: Probe, tally: Tally) -> None:
    """Stop each process for a moment, then all for longer than they wait for each other; every answer must come."""
    pids = {process.name: process.pid for process in cluster.processes}
    groups = [([pid], SHORT_FREEZE_S) for pid in pids.values()]
    groups.append(([*pids.values(), *_children(pids["orchestrator"])], LONG_FREEZE_S))
    probe.phase = "freezes"
    for group, seconds in groups:
        asking = asyncio.create_task(probe.ask_at_once(NUM_IN_FLIGHT))
        await asyncio.sleep(0)
        with _stopped(group):
            await asyncio.sleep(seconds)
        await asking
        tally.count("freezes", "done")


async def kill(cluster: LocalCluster, name: str, probe: Probe, tally: Tally) -> None:
    """End a worker in the middle of answers; those of the others must be right, those of its own end by name."""
    probe.phase = "kills"
    asking = asyncio.create_task(probe.ask_at_once(NUM_IN_FLIGHT))
    await asyncio.sleep(0.01)
    cluster.process(name).kill()
    await asking
    async with asyncio.timeout(DEATH_TIMEOUT_S):
        while cluster.process(name).alive:
            await asyncio.sleep(0.02)
    tally.count("kills", f"killed.{name}")


def _children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]
