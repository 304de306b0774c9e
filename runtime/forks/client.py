"""This process's end of its fork server."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence

from anabranch.errors import MalformedMessage
from anabranch.system.child_process import die_with_parent, python_environment, python_module
from runtime.forks.order import MAX_ORDER_BYTES, MAX_REPORT_BYTES, Failed, Order, Report, Running
from runtime.forks.server import run_order, serve_forks
from runtime.running_process import ForkedProcess
from transport.local_frames import FrameReader, send_with_descriptors

logger = logging.getLogger(__name__)

# `fork_timeout_s`: for a server's imports, the first time, and a fork.
FORK_TIMEOUT_S = 120.0
END_TIMEOUT_S = 5.0
# Beyond what this process's environment takes; what `/proc` is to show of the children.
_PADDING_BYTES = 8192
# Libraries must start no threads as they are loaded, and may look for GPUs only in a way that leaves them to children.
_SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
# What libraries read when they are loaded, which a fork does not do again. A child for whom it differs is started anew.
_READ_AT_IMPORT = (
    "ATEN_", "CUDA_", "DNNL_", "GLIBC_", "GOMP_", "GRPC_", "HF_", "HOME", "KMP_", "LANG", "LC_", "LD_", "MALLOC_",
    "MKL_", "NCCL_", "NPY_", "OMP_", "ONEDNN_", "OPENBLAS_", "PYTHON", "PYTORCH_", "TOKENIZERS_", "TORCH",
    "TRANSFORMERS_", "TZ",
)  # fmt: skip
# Of those, what the server does not go by: workers set their threads, outputs are never buffered, and the cache's
# folder is looked up with each use.
_READ_LATER = {"OMP_NUM_THREADS", "PYTHONUNBUFFERED", "TORCHINDUCTOR_CACHE_DIR"}


class ForkServer:
    """What sends orders to a server, and hears of the first half of their execution.

    Args:
        control: this end of the connection.
        environment: with which the server imported what it did.
    """

    def __init__(self, control: socket.socket, environment: Mapping[str, str]) -> None:
        self.owner_pid = os.getpid()
        control.settimeout(FORK_TIMEOUT_S)
        self._control = control
        self._environment = environment
        self._sending = threading.Lock()
        self._reports = FrameReader[Report](Report, MAX_REPORT_BYTES)  # type: ignore[arg-type]
        # The server has ended, or takes no orders.
        self.lost = False
        # It has forked once.
        self.proven = False

    def suits(self, environment: Mapping[str, str]) -> bool:
        """Whether a fork is what a process started with this environment would be."""
        return alike_at_import(self._environment, environment)

    def fork(self, order: Order, stdout: int, stderr: int) -> ForkedProcess | None:
        """Fork a child; None where the server is lost or cannot do it. Raises OSError where the system refuses."""
        ours, theirs = socket.socketpair()
        try:
            ours.settimeout(FORK_TIMEOUT_S)
            with theirs, self._sending:
                send_with_descriptors(self._control, order, [stdout, stderr, theirs.fileno()])
            received = self._reports.receive(ours)
            if received is None:
                raise ConnectionResetError("it has ended")
        except (OSError, MalformedMessage) as error:
            logger.info("the fork server is lost: %s", error or type(error).__name__)
            self.lost = True
            ours.close()
            return None
        match received[0]:
            case Running(pid=pid):
                self.proven = True
                ours.settimeout(None)
                return ForkedProcess(pid, ours)
            case Failed(errno=errno, message=message):
                ours.close()
                raise OSError(errno, message)
            case _:
                # It ended before it was what was ordered.
                ours.close()
                return None


def start_server(modules: Sequence[str]) -> ForkServer:
    """Start a server that imports these modules first; it ends with this process. Raises OSError."""
    ours, theirs = socket.socketpair()
    environment = python_environment()
    started = threading.Event()
    ended = threading.Event()
    errors: list[OSError] = []
    processes: list[subprocess.Popen[bytes]] = []

    def keep() -> None:
        # The kernel ends a child with the thread that started it, which therefore waits.
        try:
            padding = "." * (_PADDING_BYTES + sum(len(name) + len(value) + 2 for name, value in environment.items()))
            number = str(theirs.fileno())
            process = subprocess.Popen(
                python_module("runtime.forks", str(os.getpid()), number, ",".join(modules), "." * _PADDING_BYTES),
                # torch makes this folder as it is loaded, which is to make none.
                env={"TORCHINDUCTOR_CACHE_DIR": tempfile.gettempdir()}
                | environment
                | _SERVER_ENVIRONMENT
                | {"_PADDING": padding},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            errors.append(error)
            return
        else:
            processes.append(process)
        finally:
            theirs.close()
            started.set()
        processes[0].wait()
        ended.set()

    def end() -> None:
        if os.getpid() == server.owner_pid:
            # It may be in the middle of its imports; the kernel ends its children with it.
            processes[0].kill()
            ended.wait(END_TIMEOUT_S)

    threading.Thread(target=keep, name="fork-server", daemon=True).start()
    started.wait()
    if errors:
        ours.close()
        raise errors[0]
    server = ForkServer(ours, environment)
    atexit.register(end)
    return server


def fork_server_here() -> ForkServer:
    """Make a fork of this process the server: it has what was imported here. To be called with one thread."""
    ours, theirs = socket.socketpair()
    parent_pid = os.getpid()
    if os.fork():
        theirs.close()
        return ForkServer(ours, python_environment())
    status = 1
    try:
        ours.close()
        die_with_parent(parent_pid)
        order = serve_forks(theirs)
        if order is not None:
            run_order(order)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        logger.exception("a fork of the worker failed")
    finally:
        os._exit(status)


def within_bounds(order: Order) -> bool:
    """Whether a server takes an order of this length."""
    texts = (*order.arguments, *order.environment, *order.environment.values())
    return sum(len(text) + 8 for text in texts) < MAX_ORDER_BYTES


def alike_at_import(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether libraries that are loaded with either environment are the same."""

    def read(environment: Mapping[str, str]) -> dict[str, str]:
        return {
            name: value
            for name, value in environment.items()
            if name.startswith(_READ_AT_IMPORT) and name not in _READ_LATER
        }

    return read(one) == read(other)
