"""The process that forks: it has imported what its children need, has one thread, and computes nothing.

Only it reaps its children, each when whoever ordered it has heard of the end, so that a signal never goes to an id
that another process has by then. It ends when its control connection is closed, and its children with it: by its
hand, or by the kernel's where it was killed.
"""

from __future__ import annotations

import errno
import gc
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass

from anabranch.system.child_process import die_with_parent, set_process_name
from runtime.forks.order import MAX_ORDER_BYTES, NUM_DESCRIPTORS, Ended, Failed, Order, Running
from runtime.forks.proc_text import show_arguments, show_environment
from transport.local_frames import FrameReader, frame

SERVER_NAME = "fork-server"
# Each takes two descriptors here, and a process may have 1,024 by default.
MAX_CHILDREN = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class _Child:
    pid: int
    pidfd: int
    reports: socket.socket


def serve_forks(control: socket.socket) -> Order | None:
    """Fork as ordered until `control` is closed; to be called in a process with one thread.

    Returns:
        In the server: None, once all children have ended. In a child: what it is to run.
    """
    set_process_name(SERVER_NAME)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Otherwise the first collection of each child would copy the memory that all share.
    gc.collect()
    gc.freeze()
    return _ForkServer(control).serve()


def run_order(order: Order) -> None:
    """Be the process that was ordered, to be called in it; its end is the module's, as of one that was started."""
    # A module that is another's import is run afresh, as `python -m` would.
    sys.modules.pop(order.module, None)
    sys.argv = [order.module, *map(os.fsdecode, order.arguments)]
    runpy.run_module(order.module, run_name="__main__", alter_sys=True)


class _ForkServer:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._orders = FrameReader[Order](Order, MAX_ORDER_BYTES, NUM_DESCRIPTORS)
        self._children: set[_Child] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)

    def serve(self) -> Order | None:
        while True:
            for key, _ in self._selector.select():
                child: _Child | None = key.data
                if child is not None:
                    self._look_after(child, key.fd)
                elif (received := self._receive()) is None:
                    self._end()
                    return None
                elif self._fork(*received):
                    return received[0]

    def _receive(self) -> tuple[Order, list[int]] | None:
        try:
            return self._orders.receive(self._control)
        except ConnectionError:
            return None

    def _fork(self, order: Order, descriptors: list[int]) -> bool:
        """Fork a child; True in the child."""
        stdout, stderr, reports_fd = descriptors
        reports = socket.socket(fileno=reports_fd)
        server_pid = os.getpid()
        try:
            if len(self._children) >= MAX_CHILDREN:
                raise OSError(errno.EAGAIN, f"there are {MAX_CHILDREN} processes already")
            pid = os.fork()
        except OSError as error:
            with suppress(OSError):
                reports.sendall(frame(Failed(errno=error.errno or 0, message=error.strerror or str(error))))
            reports.close()
        else:
            if pid == 0:
                self._forget()
                _become(order, server_pid, stdout, stderr, reports)
                return True
            child = _Child(pid=pid, pidfd=os.pidfd_open(pid), reports=reports)
            self._children.add(child)
            self._selector.register(child.pidfd, selectors.EVENT_READ, child)
            self._selector.register(child.reports, selectors.EVENT_READ, child)
        for descriptor in (stdout, stderr):
            os.close(descriptor)
        return False

    def _forget(self) -> None:
        """In a child: close what is the server's."""
        self._selector.close()
        self._control.close()
        for child in self._children:
            os.close(child.pidfd)
            child.reports.close()
        self._children.clear()

    def _look_after(self, child: _Child, descriptor: int) -> None:
        if child not in self._children:  # an event of the same round let it go
            return
        if descriptor == child.pidfd:
            self._selector.unregister(child.pidfd)
            end = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            assert end is not None
            code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
            # Who does not hear it has closed, which is read next.
            with suppress(OSError):
                child.reports.sendall(frame(Ended(code=code)))
        else:
            # Nothing is ever sent here: the end of the connection has come.
            self._let_go(child)

    def _let_go(self, child: _Child) -> None:
        """Kill a child that still runs, and reap it."""
        os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)
        self._children.discard(child)
        with suppress(KeyError):
            self._selector.unregister(child.pidfd)
        self._selector.unregister(child.reports)
        os.close(child.pidfd)
        child.reports.close()

    def _end(self) -> None:
        for child in tuple(self._children):
            self._let_go(child)
        self._selector.close()
        self._control.close()


def _become(order: Order, server_pid: int, stdout: int, stderr: int, reports: socket.socket) -> None:
    """Turn a fork into what a process that was started with this order would be."""
    die_with_parent(server_pid)
    if order.new_session:
        os.setsid()
    stdin = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in ((stdin, 0), (stdout, 1), (stderr, 2)):
        os.dup2(descriptor, number)
    for descriptor in (stdin, stdout, stderr):
        os.close(descriptor)
    set_process_name(order.name)
    show_arguments((b"anabranch", order.name.encode(), order.module.encode(), *order.arguments))
    show_environment(order.environment)
    os.environb.clear()
    os.environb.update(order.environment)
    os.chdir(order.folder)
    os.sched_setaffinity(0, order.cores)
    # What modules keep of the server's environment, and what no two processes may have in common.
    tempfile.tempdir = None
    if (random := sys.modules.get("numpy.random")) is not None:
        random.seed()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reports.sendall(frame(Running(pid=os.getpid())))
    reports.close()
