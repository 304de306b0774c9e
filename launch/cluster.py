"""A whole cluster on this machine, as child processes of the caller.

Life: start (private folder, sweeper, orchestrator and workers side by side) -> ready (the gateway serves and
every worker is registered) -> deaths are noticed, recorded and told to the orchestrator -> stop (SIGTERM,
SIGKILL, folder removed). Whoever uses it (the command line, `verify`, benchmarks, tests) sees the same thing:

    with LocalCluster(topology) as cluster:
        client = Client(cluster.endpoint)
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import get_args

import psutil

from anabranch.config.load import check_topology
from anabranch.config.topology import Topology
from anabranch.config.worker import WorkerConfig
from anabranch.errors import ConfigError, DeadlineExceeded, WorkerDied
from anabranch.model.sources import resolve_model
from anabranch.protocol.workers import Role
from anabranch.system.child_process import python_environment
from anabranch.system.clock import awake_s
from anabranch.system.private_files import private_folder, write_secret
from anabranch.system.user_cache import cache_folder, cache_problem
from anabranch_client import Admin
from launch import sweeper
from launch.ffn_scale import FfnScale
from launch.gateway_probe import GatewayProbe
from launch.machine_fit import check_fit, most_ffn_workers
from launch.process import IMPORTS, ChildProcess, ProcessExit, stop_all, wait_all
from launch.process_plan import (
    ORCHESTRATOR_NAME,
    ProcessPlan,
    plan_ffn_worker,
    plan_orchestrator,
    plan_processes,
    plan_workers,
)
from launch.terminal_text import said
from runtime.start import prepare_forks

READY_TIMEOUT_S = 300.0
DRAIN_TIMEOUT_S = 3.0
LEAVE_TIMEOUT_S = 1.0
TERM_TIMEOUT_S = 2.0
KILL_TIMEOUT_S = 5.0
REPORT_TIMEOUT_S = 1.0
FOLLOW_TIMEOUT_S = 30.0
_POLL_S = 0.02
# The last line of a process that ended on purpose: from the flags' parser, or from the log.
_ERROR_LINE = re.compile(r"(?:Error: |\S+ E \S+ \S+: )(.+)")


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """One line of the process table."""

    name: str
    role: str
    pid: int
    num_threads: int
    cores: tuple[int, ...]
    alive: bool


class LocalCluster:
    """Orchestrator and workers of a topology, started on enter and gone without a trace on exit.

    Args:
        verbose: echo the children's logs to stderr.
        ready_timeout_s: from start to serving; the first start of a model may convert it.
        on_death: called on a thread of the dead child, for each process that ended by itself.
        log_folder: keep the children's logs there instead of in the temporary folder.
        sweep_paths: files that are removed with the cluster even where this process is killed.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        verbose: bool = False,
        ready_timeout_s: float = READY_TIMEOUT_S,
        on_death: Callable[[ProcessExit], None] | None = None,
        log_folder: Path | None = None,
        sweep_paths: Sequence[Path] = (),
    ) -> None:
        self.topology = check_topology(topology)
        self._verbose = verbose
        self._ready_timeout_s = ready_timeout_s
        self._user_on_death = on_death
        self._log_folder = log_folder
        self._sweep_paths = tuple(sweep_paths)
        self._folder: Path | None = None
        self._sweeper: subprocess.Popen[bytes] | None = None
        self._lifeline: int | None = None
        self._plans: tuple[ProcessPlan, ...] = ()
        self._children: dict[str, ChildProcess] = {}
        self._deaths: list[ProcessExit] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._probe: GatewayProbe | None = None
        self._ffn_scale: FfnScale | None = None
        # Names of those whose orderly end is no death.
        self._leaving: set[str] = set()

    # What a user asks ---------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """`host:port` of the gateway."""
        if self._probe is None:
            raise RuntimeError("the cluster is not ready; enter it first")
        return self._probe.endpoint

    @property
    def folder(self) -> Path:
        """The private folder: sockets, secrets and logs."""
        assert self._folder is not None
        return self._folder

    @property
    def admin_token_file(self) -> Path:
        """Holds the token that the Admin service wants to see."""
        return self.folder / "admin.token"

    @property
    def processes(self) -> tuple[ProcessInfo, ...]:
        """All processes, the orchestrator first, every worker's ranks behind it."""
        processes: list[ProcessInfo] = []
        for plan in self._plans:
            child = self._children.get(plan.name)
            if child is None:
                continue
            roles = dict.fromkeys(worker.role for worker in plan.workers)
            meshes = dict.fromkeys(f" tp {w.tp} x cp {w.cp}" for w in plan.workers if w.num_ranks > 1)
            processes.append(
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
                    processes.extend(_ranks(worker, child.pid))
        return tuple(processes)

    @property
    def deaths(self) -> tuple[ProcessExit, ...]:
        """Processes that ended by themselves, in order."""
        with self._changed:
            return tuple(self._deaths)

    def wait_for_death(self, timeout_s: float | None = None, *, after: int = 0) -> ProcessExit | None:
        """The death after the first `after` ones, or None where `timeout_s` runs out."""
        with self._changed:
            if self._changed.wait_for(lambda: len(self._deaths) > after, timeout_s):
                return self._deaths[after]
        return None

    @property
    def missing_role(self) -> str:
        """A role without which the living workers cannot serve; empty where they can."""
        living = {
            worker.role
            for plan in self._plans
            if (child := self._children.get(plan.name)) is not None and child.alive
            for worker in plan.workers
        }
        if "colocated" in living or {"prefill", "decode"} <= living or {"prefill", "attn", "ffn"} <= living:
            return ""
        started = {worker.role for plan in self._plans for worker in plan.workers}
        missing: str = next(role for role in get_args(Role) if role in started - living)
        return missing

    def process(self, name: str) -> ChildProcess:
        """The child called `name`. Raises KeyError."""
        return self._children[name]

    def log(self, name: str) -> str:
        """Everything that a child has written so far."""
        return self._children[name].log.read_text(errors="replace")

    # Life ---------------------------------------------------------------------------------------------

    def __enter__(self) -> LocalCluster:
        if self._folder is None:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start everything and wait until requests are served.

        Raises:
            ConfigError: the meshes do not fit the model or this machine, or logs cannot be written; nothing is left.
            ModelError: the model cannot be found or converted.
            WorkerDied: a process ended before the cluster was ready; the message has its last lines.
            DeadlineExceeded: not ready in time; the message says who is missing.
        """
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all processes and remove the folder. Idempotent; a Ctrl-C on the way only makes it quicker."""
        with self._changed:
            self._stopping = True
        if self._ffn_scale is not None:
            self._ffn_scale.stop()
        children = [child for child in self._children.values() if child.alive]
        # The orchestrator leads: it ends its requests, then tells the workers to exit.
        leader = [child for child in children if child.name == ORCHESTRATOR_NAME]
        workers = [child for child in children if child not in leader]
        try:
            stop_all(
                leader,
                drain_timeout_s=DRAIN_TIMEOUT_S,
                term_timeout_s=TERM_TIMEOUT_S,
                kill_timeout_s=KILL_TIMEOUT_S,
            )
            left = wait_all(workers, LEAVE_TIMEOUT_S if leader else 0.0)
            stop_all(
                left, drain_timeout_s=LEAVE_TIMEOUT_S, term_timeout_s=TERM_TIMEOUT_S, kill_timeout_s=KILL_TIMEOUT_S
            )
        except KeyboardInterrupt:
            for child in children:
                child.kill()
            wait_all(children, KILL_TIMEOUT_S)
            raise
        finally:
            self._clean_up()

    def _start(self) -> None:
        if self._folder is not None:
            raise RuntimeError("a LocalCluster starts once; make a new one")
        deadline = awake_s() + self._ready_timeout_s
        prepare_forks(IMPORTS)
        source = resolve_model(self.topology.model)  # an unknown name is refused here; a conversion happens once
        check_fit(self.topology, source)
        self._folder = private_folder()
        self._start_sweeper()
        control = f"ipc://{self._folder}/control.sock"
        endpoints = self._folder / "endpoints.json"
        secret = write_secret(self._folder / "control.secret")
        write_secret(self.admin_token_file)
        workers = plan_workers(self.topology, control, secret_file=secret)
        self._plans = (
            plan_orchestrator(
                self.topology,
                control,
                secret_file=secret,
                admin_token_file=self.admin_token_file,
                endpoints_file=endpoints,
            ),
            *plan_processes(self.topology, workers),
        )
        for plan in self._plans:
            self._start_child(plan)
        self._wait_ready(endpoints, {worker.name for worker in workers}, deadline)
        if self.topology.pools.ffn is not None:
            admin = Admin(self.endpoint, token_file=self.admin_token_file)
            self._ffn_scale = FfnScale(admin, self, most_ffn_workers(self.topology, source), self._say)
            if not self._ffn_scale.wait_following(FOLLOW_TIMEOUT_S):
                raise DeadlineExceeded(
                    f"cluster start: the orchestrator does not say how many ffn workers it wants ({FOLLOW_TIMEOUT_S} s)"
                )

    def _start_child(self, plan: ProcessPlan) -> None:
        child = self._child(plan)
        self._children[plan.name] = child
        child.start()

    def _say(self, text: str) -> None:
        sys.stderr.write(f"{said(text)}\n")

    # FFN workers that come and go; see `FfnWorkers` -------------------------------------------------------

    def ffn_workers(self) -> tuple[str, ...]:
        with self._changed:
            return tuple(
                plan.name
                for plan in self._plans
                if plan.name not in self._leaving
                and any(worker.role == "ffn" for worker in plan.workers)
                and self._children[plan.name].alive
            )

    def start_ffn_worker(self) -> str:
        control, secret = f"ipc://{self.folder}/control.sock", self.folder / "control.secret"
        with self._changed:
            if self._stopping:
                raise WorkerDied("the cluster ends")
            living = {name for name, child in self._children.items() if child.alive}
            index = next(index for index in range(len(living) + 1) if f"ffn-{index}" not in living)
            plan = plan_ffn_worker(self.topology, control, index, secret_file=secret)
            # The youngest stands last.
            self._plans = (*(old for old in self._plans if old.name != plan.name), plan)
            self._leaving.discard(plan.name)
            self._start_child(plan)
        return plan.name

    def expect_leave(self, name: str) -> None:
        with self._changed:
            self._leaving.add(name)

    def running(self, name: str) -> bool:
        return self._children[name].alive

    # Start and end ----------------------------------------------------------------------------------------

    def _child(self, plan: ProcessPlan) -> ChildProcess:
        environment = python_environment({sweeper.MARK: str(self._folder), "PYTHONUNBUFFERED": "1"})
        # What a child leaves in the system's temporary folder goes with the cluster's.
        environment["TMPDIR"] = str(self.folder)
        # ... except this, which is worth keeping.
        if cache_problem() is None:
            environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "torchinductor"))
        if plan.num_threads:
            environment["OMP_NUM_THREADS"] = str(plan.num_threads)
        return ChildProcess(
            name=plan.name,
            module=plan.module,
            arguments=plan.arguments,
            log=_log_file(self._log_folder or self.folder, plan.name),
            environment=environment,
            on_exit=self._on_exit,
            echo=self._verbose,
        )

    def _start_sweeper(self) -> None:
        assert self._folder is not None
        read_end, self._lifeline = os.pipe()
        try:
            self._sweeper = subprocess.Popen(
                [sys.executable, "-I", "-S", sweeper.__file__, str(read_end), str(self._folder)]
                + [str(path) for path in (self._folder, *self._sweep_paths)],
                pass_fds=(read_end,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            os.close(read_end)

    def _wait_ready(self, endpoints: Path, names: set[str], deadline: float) -> None:
        probe: GatewayProbe | None = None
        missing = set(names)
        while True:
            self._raise_if_dead()
            if probe is None and endpoints.exists():
                probe = GatewayProbe.from_file(endpoints)
            if probe is not None:
                missing = names - probe.worker_names()
                if not missing and probe.serving():
                    break
            if awake_s() > deadline:
                who = ", ".join(sorted(missing)) if probe is not None else "orchestrator"
                raise DeadlineExceeded(
                    f"cluster start: {who or 'the gateway'} not ready after {self._ready_timeout_s:g} s; "
                    "look at the logs with --verbose, or give --ready-timeout"
                )
            with self._changed:
                self._changed.wait_for(lambda: bool(self._deaths), _POLL_S)
        self._probe = probe

    def _raise_if_dead(self) -> None:
        for death in self.deaths:
            raise start_error(death)

    def _on_exit(self, death: ProcessExit) -> None:
        with self._changed:
            if self._stopping:
                return
            plan = next(plan for plan in self._plans if plan.name == death.name)
            left = death.name in self._leaving and death.code == 0
            if left:
                self._leaving.discard(death.name)
                self._plans = tuple(other for other in self._plans if other is not plan)
            else:
                self._deaths.append(death)
                self._changed.notify_all()
        probe = self._probe
        if probe is not None:
            for worker in plan.workers:
                probe.report_exit(worker.name, death.pid, death.reason, REPORT_TIMEOUT_S)
        if self._user_on_death is not None and not left:
            self._user_on_death(death)

    def _clean_up(self) -> None:
        if self._probe is not None:
            self._probe.close()
            self._probe = None
        if self._folder is not None:
            # Children of children, should a worker have left some.
            sweeper.kill_marked(str(self._folder), KILL_TIMEOUT_S)
            shutil.rmtree(self._folder, ignore_errors=True)
        for path in self._sweep_paths:
            # A folder that could not be written cannot be cleared either.
            with contextlib.suppress(OSError):
                path.unlink()
        if self._lifeline is not None:
            with contextlib.suppress(OSError):
                os.write(self._lifeline, b".")
            os.close(self._lifeline)
            self._lifeline = None
        if self._sweeper is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._sweeper.wait(KILL_TIMEOUT_S)
            self._sweeper = None


def start_error(death: ProcessExit) -> WorkerDied:
    """What a death before readiness means: the reason that the process gave, else its end and last lines."""
    last = death.log_tail[-1] if death.log_tail else ""
    if death.code > 0 and (match := _ERROR_LINE.fullmatch(last)):
        return WorkerDied(f"{death.name}: {match[1]}")
    lines = "\n".join(f"    {line}" for line in death.log_tail) or "    (it wrote nothing)"
    return WorkerDied(f"{death} before the cluster was ready; its last lines:\n{lines}")


def _log_file(folder: Path, name: str) -> Path:
    """The log of a child, empty or as an earlier child left it. Raises ConfigError."""
    log = folder / f"{name}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Opening a FIFO would otherwise wait for its reader.
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        os.close(descriptor)
    except OSError as error:
        raise ConfigError(
            "--log-dir", str(folder), f"{log.name} cannot be written there ({error.strerror}); name another folder"
        ) from None
    if not is_file:
        raise ConfigError("--log-dir", str(folder), f"{log.name} there is no regular file; name another folder")
    return log


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
