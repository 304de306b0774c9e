"""The processes that encode prompts: a fork server, and the encoders that it forks.

    orchestrator --fork--> fork server --fork--> encoder, encoder, ...
         `---- Fork, End ------^                    ^
         `---- EncodeText, EncodeChat --------------'

The orchestrator forks the server once, when the model's tokenizer is loaded and before any thread exists. The server
encodes nothing itself, so it can fork at any time: a new encoder is there within milliseconds and shares the
tokenizer's memory. Only the server kills and reaps encoders, so a process id never names another process.

An encoder has an address space of limited size, and is what the system ends first when memory is short. All of
these processes end with the orchestrator: they read the end of their connections, and the kernel kills them with
their parent. They take no notice of SIGINT and SIGTERM.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from anabranch.errors import AnabranchError
from anabranch.system.child_process import die_with_parent, set_process_name, signal_name
from orchestrator.encoding.messages import (
    MAX_SMALL_BYTES,
    Ended,
    Failed,
    Fork,
    Forked,
    FromEncoder,
    ToEncoder,
    ToForkServer,
)
from transport.local_frames import FrameReader, frame

logger = logging.getLogger(__name__)

Encode = Callable[[ToEncoder], Iterable[FromEncoder]]

SERVER_NAME = "encoders"


def start_fork_server(encode: Encode, *, memory_bytes: int, max_request_bytes: int) -> tuple[int, socket.socket]:
    """Fork the server; to be called while this process has one thread.

    Args:
        encode: what encoders do with a request; the last of its answers is Encoded or Failed.
        memory_bytes: address space that an encoder may take beyond what it starts with.
        max_request_bytes: largest message to an encoder.

    Returns:
        `(pid, the orchestrator's end of the control connection)`.
    """
    ours, theirs = socket.socketpair()
    orchestrator_pid = os.getpid()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    status = 1
    try:
        ours.close()
        die_with_parent(orchestrator_pid)
        serve_forks(theirs, encode, memory_bytes=memory_bytes, max_request_bytes=max_request_bytes)
        status = 0
    except BaseException:
        logger.exception("the process that starts encoders failed")
    finally:
        os._exit(status)


def serve_forks(control: socket.socket, encode: Encode, *, memory_bytes: int, max_request_bytes: int) -> None:
    """Fork and end encoders as told, until the orchestrator closes `control`; then end them all."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    set_process_name(SERVER_NAME)
    # One thread for each encoder: its share of the machine is bounded by the number of encoders.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Otherwise the first collection of each encoder would copy the memory that all share.
    gc.collect()
    gc.freeze()
    messages = FrameReader[ToForkServer](ToForkServer, MAX_SMALL_BYTES)  # type: ignore[arg-type]
    pids: set[int] = set()
    try:
        while (received := messages.receive(control)) is not None:
            message, descriptors = received
            if not isinstance(message, Fork):
                pids.remove(message.pid)  # an id that is reaped may be another process's already
                control.sendall(frame(Ended(how=_end(message.pid))))
                continue
            connection = socket.socket(fileno=descriptors[0])
            try:
                server_pid = os.getpid()
                pid = os.fork()
            except OSError as error:
                control.sendall(frame(Failed(code="internal", message=f"cannot fork: {error}")))
                continue
            if pid == 0:
                control.close()
                _be_encoder(connection, encode, server_pid, message.name, memory_bytes, max_request_bytes)
            connection.close()
            pids.add(pid)
            control.sendall(frame(Forked(pid=pid)))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            _end(pid)


def _end(pid: int) -> str:
    """Kill a child that may have ended already, reap it, and say how it ended."""
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return f"exit status {code}" if code >= 0 else f"killed by {signal_name(-code)}"


def _be_encoder(
    connection: socket.socket, encode: Encode, server_pid: int, name: str, memory_bytes: int, max_request_bytes: int
) -> NoReturn:
    status = 1
    try:
        die_with_parent(server_pid)
        set_process_name(name)
        _limit_memory(memory_bytes)
        requests = FrameReader[ToEncoder](ToEncoder, max_request_bytes)  # type: ignore[arg-type]
        while (received := requests.receive(connection)) is not None:
            for answer in encode(received[0]):
                connection.sendall(frame(answer))
        status = 0
    except ConnectionError:
        status = 0
    except MemoryError:
        logger.error("an encoder ends: a prompt needs more than the %d bytes that it may take", memory_bytes)
    except AnabranchError as error:
        logger.error("an encoder ends: %s", error)
    except Exception:
        logger.exception("an encoder failed")
    finally:
        os._exit(status)


def _limit_memory(memory_bytes: int) -> None:
    """Let this process take so much more, and be the first to end when the system has no more."""
    try:
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:  # not Linux
        return
    limit = num_pages * resource.getpagesize() + memory_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
