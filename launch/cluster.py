"""A whole cluster on this machine, as child processes of the caller.

Life: start (private folder, sweeper, orchestrator and workers side by side) -> ready (the gateway serves and
every worker is registered) -> deaths are noticed, recorded and told to the orchestrator, and workers that died are
started again (`Supervisor`) -> stop (SIGTERM, SIGKILL, folder removed). Whoever uses it (the command line, `verify`,
benchmarks, tests) sees the same thing:

    with LocalCluster(topology) as cluster:
        client = Client(cluster.endpoint)
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from anabranch.config.load import check_topology
from anabranch.config.topology import Topology
from anabranch.errors import DeadlineExceeded, WorkerDied
from anabranch.model.sources import resolve_model
from anabranch.system.child_process import python_environment
from anabranch.system.clock import awake_s
from anabranch.system.private_files import private_folder, write_secret
from anabranch.system.user_cache import cache_folder, cache_problem
from anabranch_client import Admin
from launch import sweeper
from launch.ffn_scale import FfnScale
from launch.gateway_probe import GatewayProbe
from launch.log_file import log_file
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
from launch.process_table import ProcessEnd, ProcessInfo, ProcessTable, missing_role
from launch.start_error import start_error
from launch.supervisor import Supervisor
from launch.sweep import Sweep
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
        self._sweep: Sweep | None = None
        self._table = ProcessTable()
        self._changed = self._table.changed
        self._stopping = False
        self._probe: GatewayProbe | None = None
        self._ffn_scale: FfnScale | None = None
        # From readiness on; before, a death ends the start.
        self._supervisor: Supervisor | None = None

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
        return self._table.lines()

    @property
    def deaths(self) -> tuple[ProcessExit, ...]:
        """Processes that ended by themselves and were not drained, in order."""
        return self._table.deaths

    def wait_for_death(self, timeout_s: float | None = None, *, after: int = 0) -> ProcessExit | None:
        """The death after the first `after` ones, or None where `timeout_s` runs out."""
        return self._table.wait_for_death(timeout_s, after)

    def wait_for_end(self, *, after: int = 0) -> ProcessEnd:
        """The end after the first `after` ones, be it a death or an orderly one."""
        return self._table.wait_for_end(after)

    @property
    def missing_role(self) -> str:
        """A role without which the workers that live, or will be started again, cannot serve; empty where they can."""
        living = {
            worker.role
            for plan in self._table.plans
            if self._alive(plan.name) or self._returns(plan.name)
            for worker in plan.workers
        }
        return missing_role(set(self.topology.pools.by_role), living)

    @property
    def lost(self) -> tuple[str, ...]:
        """Names of processes that there should be, are not, and will not be started again."""
        return tuple(
            plan.name for plan in self._table.plans if not self._alive(plan.name) and not self._returns(plan.name)
        )

    def process(self, name: str) -> ChildProcess:
        """The child called `name`. Raises KeyError."""
        return self._table.children[name]

    def log(self, name: str) -> str:
        """Everything that a child has written so far."""
        return self._table.children[name].log.read_text(errors="replace")

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
        if self._supervisor is not None:
            self._supervisor.stop()
        if self._ffn_scale is not None:
            self._ffn_scale.stop()
        children = [child for child in self._table.children.values() if child.alive]
        for child in self._table.children.values():
            if not child.started:
                child.kill()
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
        source = resolve_model(self.topology.model)  # an unknown name is refused here; a conversion happens once
        prepare_forks(IMPORTS)
        check_fit(self.topology, source)
        self._folder = private_folder()
        self._sweep = Sweep(self._folder, self._sweep_paths)
        control = f"ipc://{self._folder}/control.sock"
        endpoints = self._folder / "endpoints.json"
        secret = write_secret(self._folder / "control.secret")
        write_secret(self.admin_token_file)
        workers = plan_workers(self.topology, control, secret_file=secret)
        self._table.plans = (
            plan_orchestrator(
                self.topology,
                control,
                secret_file=secret,
                admin_token_file=self.admin_token_file,
                endpoints_file=endpoints,
            ),
            *plan_processes(self.topology, workers),
        )
        for plan in self._table.plans:
            self._enter_child(plan).start()
        self._wait_ready(endpoints, {worker.name for worker in workers}, deadline)
        self._supervisor = Supervisor(self.topology.restart, self._start_again, self._back, self._say)
        if self.topology.pools.ffn is not None:
            admin = Admin(self.endpoint, token_file=self.admin_token_file)
            self._ffn_scale = FfnScale(admin, self, most_ffn_workers(self.topology, source), self._say)
            if not self._ffn_scale.wait_following(FOLLOW_TIMEOUT_S):
                raise DeadlineExceeded(
                    f"cluster start: the orchestrator does not say how many ffn workers it wants ({FOLLOW_TIMEOUT_S} s)"
                )

    def _enter_child(self, plan: ProcessPlan) -> ChildProcess:
        """A process of the table, to be started outside the lock: that may take as long as a fork server's imports."""
        child = self._table.children[plan.name] = self._child(plan)
        return child

    def _say(self, text: str) -> None:
        sys.stderr.write(f"{said(text)}\n")

    # FFN workers that come and go; see `FfnWorkers` -------------------------------------------------------

    def ffn_workers(self) -> tuple[str, ...]:
        with self._changed:
            return tuple(
                plan.name
                for plan in self._table.plans
                if not self._table.leaving(plan.name)
                and any(worker.role == "ffn" for worker in plan.workers)
                and (self._alive(plan.name) or self._returns(plan.name))
            )

    def start_ffn_worker(self) -> str:
        control, secret = f"ipc://{self.folder}/control.sock", self.folder / "control.secret"
        with self._changed:
            if self._stopping:
                raise WorkerDied("the cluster ends")
            names = (f"ffn-{index}" for index in itertools.count())
            name = next(name for name in names if not self._alive(name) and not self._returns(name))
            plan = plan_ffn_worker(self.topology, control, int(name.removeprefix("ffn-")), secret_file=secret)
            self._table.add(plan)
            child = self._enter_child(plan)
        child.start()
        return name

    def expect_leave(self, name: str) -> None:
        self._table.leave(name)
        if self._supervisor is not None:
            self._supervisor.forget(name)

    def running(self, name: str) -> bool:
        return self._alive(name)

    # Workers that come back; see `Supervisor` ---------------------------------------------------------------

    def _alive(self, name: str) -> bool:
        child = self._table.children.get(name)
        return child is not None and not child.ended

    def _returns(self, name: str) -> bool:
        return self._supervisor is not None and self._supervisor.expects(name)

    def _start_again(self, name: str) -> None:
        with self._changed:
            plan = self._table.plan(name)
            if plan is None or self._stopping or self._alive(name):
                return
            child = self._enter_child(plan)
        child.start()

    def _back(self, name: str) -> bool:
        plan = self._table.plan(name)
        child = self._table.children[name]
        if plan is None or self._probe is None or not child.alive:
            return False
        registered = self._probe.worker_pids()
        pid = child.pid
        return all(registered.get(worker.name) == pid for worker in plan.workers)

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
            log=log_file(self._log_folder or self.folder, plan.name),
            environment=environment,
            on_exit=self._on_exit,
            echo=self._verbose,
        )

    def _wait_ready(self, endpoints: Path, names: set[str], deadline: float) -> None:
        probe: GatewayProbe | None = None
        missing = set(names)
        while True:
            self._raise_if_dead()
            if probe is None and endpoints.exists():
                probe = GatewayProbe.from_file(endpoints)
            if probe is not None:
                missing = names - set(probe.worker_pids())
                if not missing and probe.serving():
                    break
            if awake_s() > deadline:
                who = ", ".join(sorted(missing)) if probe is not None else "orchestrator"
                raise DeadlineExceeded(
                    f"cluster start: {who or 'the gateway'} not ready after {self._ready_timeout_s:g} s; "
                    "look at the logs with --verbose, or give --ready-timeout"
                )
            self.wait_for_death(_POLL_S)
        self._probe = probe

    def _raise_if_dead(self) -> None:
        for death in self.deaths:
            raise start_error(death)

    def _on_exit(self, death: ProcessExit) -> None:
        with self._changed:
            if self._stopping:
                return
            plan = self._table.plan(death.name)
            supervisor = self._supervisor if death.name != ORCHESTRATOR_NAME else None
            # Before it was ready there was nothing to drain.
            left = death.code == 0 and (supervisor is not None or self._table.leaving(death.name))
            stays = left or supervisor is None or self._table.leaving(death.name)
            again_in_s = None if stays or supervisor is None else supervisor.died(death.name)
            self._table.ended(ProcessEnd(exit=death, left=left, again_in_s=again_in_s))
        probe = self._probe
        if probe is not None and plan is not None:
            for worker in plan.workers:
                probe.report_exit(worker.name, death.pid, death.reason, REPORT_TIMEOUT_S)
        if self._user_on_death is not None and not left:
            self._user_on_death(death)

    def _clean_up(self) -> None:
        if self._probe is not None:
            self._probe.close()
            self._probe = None
        if self._sweep is not None:
            self._sweep.now(KILL_TIMEOUT_S)
            self._sweep = None
