"""Where a child process of ours comes from: a fork, which is there at once, or a new interpreter.

A process has at most one fork server, which is started when the first child is, and serves until the process ends. A
fork has the modules that the server imported, and nothing else that a new process would not have: see `Order`. Where a
fork cannot be had (no Linux, no server, an environment that libraries read as they are loaded), a new interpreter runs
the same module.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

from anabranch.system.child_process import python_environment, python_module
from runtime.forks.client import ForkServer, alike_at_import, fork_server_here, start_server, within_bounds
from runtime.forks.order import Order
from runtime.running_process import RunningProcess, StartedProcess

logger = logging.getLogger(__name__)

# What every worker and rank imports, which takes seconds: once, in the fork server.
SHARED_IMPORTS = (
    "runtime.entry",
    "runtime.rank_process",
    "runtime.generation.worker",
    # What transformers loads when it first reads a model's configuration, and that takes as long as torch.
    "transformers.models.auto.configuration_auto",
    "transformers.models.llama.configuration_llama",
    "transformers.models.auto.tokenization_auto",
)


class _Source:
    """This process's fork server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: ForkServer | None = None
        self._possible = sys.platform == "linux" and hasattr(os, "pidfd_open")

    def server(self, modules: Sequence[str], environment: Mapping[str, str]) -> ForkServer | None:
        """The server that suits an environment; where there is none, one is started, unless the last could not be."""
        with self._lock:
            server = self._server
            if server is not None and server.owner_pid != os.getpid():
                server = None
            if server is not None and server.lost:
                self._possible = self._possible and server.proven
                server = None
            if server is None and self._possible and alike_at_import(python_environment(), environment):
                try:
                    server = start_server(modules)
                except OSError as error:
                    logger.info("no fork server: %s", error)
            self._server = server
            return server if server is not None and server.suits(environment) else None

    def fork_here(self) -> None:
        with self._lock:
            if self._possible and len(os.listdir("/proc/self/task")) == 1:
                self._server = fork_server_here()


_source = _Source()


def prepare_forks(modules: Sequence[str]) -> None:
    """Have a fork server get ready, which will be needed: it imports these modules meanwhile."""
    _source.server(modules, python_environment())


def fork_from_here() -> None:
    """Let children be forks of this process as it is now, where it has one thread still."""
    _source.fork_here()


def start_process(
    *,
    name: str,
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    stdout: int,
    stderr: int,
    new_session: bool,
    imports: Sequence[str],
) -> RunningProcess:
    """Run `python -m MODULE ARGUMENTS` as a child that ends with this process, its standard input empty.

    To be called on a thread that lives as long as the child: the kernel ends a child with the thread that started it.

    Args:
        name: shown by `ps` and `top`.
        environment: the child's whole environment.
        stdout, stderr: descriptors, which stay the caller's.
        new_session: whether the child leads a session and a process group.
        imports: what a fork server should have imported, where this starts one.

    Raises:
        OSError: the system refuses.
    """
    server = _source.server(imports, environment)
    if server is not None:
        forked = _fork(server, name, module, arguments, environment, stdout, stderr, new_session)
        if forked is not None:
            return forked
    return StartedProcess(
        subprocess.Popen(
            python_module("runtime.child", str(os.getpid()), name, module, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=dict(environment),
            start_new_session=new_session,
        )
    )


def _fork(
    server: ForkServer,
    name: str,
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    stdout: int,
    stderr: int,
    new_session: bool,
) -> RunningProcess | None:
    try:
        folder = os.getcwdb()
    except FileNotFoundError:  # a new process would be in it all the same
        return None
    order = Order(
        name=name,
        module=module,
        arguments=tuple(map(os.fsencode, arguments)),
        environment={os.fsencode(key): os.fsencode(value) for key, value in environment.items()},
        folder=folder,
        cores=tuple(sorted(os.sched_getaffinity(0))),
        new_session=new_session,
    )
    return server.fork(order, stdout, stderr) if within_bounds(order) else None
