"""The processes of a cluster: which there shall be, which there are, and how those ended that are not."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import get_args

import psutil

from anabranch.config.worker import WorkerConfig
from anabranch.protocol.workers import Role
from launch.process import ChildProcess, ProcessExit
from launch.process_plan import ProcessPlan


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """One line of the process table."""

    name: str
    role: str
    pid: int
    num_threads: int
    cores: tuple[int, ...]
    alive: bool


@dataclass(frozen=True, kw_only=True)
class ProcessEnd:
    """A process that ended by itself.

    Attributes:
        left: it was drained, so that its end is no death.
        again_in_s: after which it is started again; None: it is not.
    """

    exit: ProcessExit
    left: bool
    again_in_s: float | None


class ProcessTable:
    """Changed and asked from any thread.

    Attributes:
        changed: guards the table, and tells of ends.
        plans: those of processes that there shall be, in the order of the table.
        children: by name.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.plans: tuple[ProcessPlan, ...] = ()
        self.children: dict[str, ChildProcess] = {}
        self._ends: list[ProcessEnd] = []
        # Names of those whose orderly end is no death.
        self._leaving: set[str] = set()

    def add(self, plan: ProcessPlan) -> None:
        """There shall be one more; the youngest stands last."""
        with self.changed:
            self.plans = (*(old for old in self.plans if old.name != plan.name), plan)
            self._leaving.discard(plan.name)

    def plan(self, name: str) -> ProcessPlan | None:
        """The plan of a process that there shall be."""
        with self.changed:
            return next((plan for plan in self.plans if plan.name == name), None)

    def leave(self, name: str) -> None:
        """An orderly end of this one is no death from now on, and it does not come back after another."""
        with self.changed:
            self._leaving.add(name)

    def leaving(self, name: str) -> bool:
        with self.changed:
            return name in self._leaving

    def ended(self, end: ProcessEnd) -> None:
        """Write an end down; one that left shall be no more."""
        with self.changed:
            if end.left:
                self.plans = tuple(plan for plan in self.plans if plan.name != end.exit.name)
                self._leaving.discard(end.exit.name)
            self._ends.append(end)
            self.changed.notify_all()

    @property
    def deaths(self) -> tuple[ProcessExit, ...]:
        """Processes that ended by themselves and were not drained, in order."""
        with self.changed:
            return tuple(end.exit for end in self._ends if not end.left)

    def wait_for_death(self, timeout_s: float | None, after: int) -> ProcessExit | None:
        with self.changed:
            if self.changed.wait_for(lambda: len(self.deaths) > after, timeout_s):
                return self.deaths[after]
        return None

    def wait_for_end(self, after: int) -> ProcessEnd:
        with self.changed:
            self.changed.wait_for(lambda: len(self._ends) > after)
            return self._ends[after]

    def lines(self) -> tuple[ProcessInfo, ...]:
        """All processes, the orchestrator first, every worker's ranks behind it."""
        found: list[ProcessInfo] = []
        for plan in self.plans:
            child = self.children.get(plan.name)
            if child is None or not child.started:
                continue
            roles = dict.fromkeys(worker.role for worker in plan.workers)
            meshes = dict.fromkeys(f" tp {w.tp} x cp {w.cp}" for w in plan.workers if w.num_ranks > 1)
            found.append(
                ProcessInfo(
                    name=plan.name,
                    role=("+".join(roles) or plan.name) + ",".join(meshes),
                    pid=child.pid,
                    num_threads=plan.num_threads,
                    cores=plan.cores,
                    alive=child.alive,
                )
            )
            for worker in plan.workers:
                if worker.num_ranks > 1 and worker.rank_processes:
                    found.extend(_ranks(worker, child.pid))
        return tuple(found)


def missing_role(started: set[Role], living: set[Role]) -> str:
    """A role without which `living` workers cannot serve; empty where they can."""
    if "colocated" in living or {"prefill", "decode"} <= living or {"prefill", "attn", "ffn"} <= living:
        return ""
    missing: str = next(role for role in get_args(Role) if role in started - living)
    return missing


def _ranks(worker: WorkerConfig, pid: int) -> list[ProcessInfo]:
    """The ranks with processes of their own, by the names that they go by; none where the worker has ended."""
    found: list[ProcessInfo] = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            name, _, rank = child.name().rpartition(".")
            # The kernel cuts long names.
            if rank.isdigit() and worker.name.startswith(name) and 0 < int(rank) < worker.num_ranks:
                found.append(
                    ProcessInfo(
                        name=child.name(),
                        role=f"rank {rank}",
                        pid=child.pid,
                        num_threads=worker.threads,
                        cores=worker.cores_of(int(rank)),
                        alive=child.status() != psutil.STATUS_ZOMBIE,
                    )
                )
    return sorted(found, key=lambda rank: int(rank.name.rpartition(".")[2]))
