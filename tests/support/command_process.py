"""`python -m tests.support.command_process`: runs `anabranch` again and again, each time in a fork of this process.

The command line is imported once, so that a run takes milliseconds, and ends as the real command does, with the
interpreter's own flush at exit. What commands start (a cluster, a reference) is replaced; their streams and words are
the real ones. Asked through `PeerProcess` with

    argv: what follows `anabranch`.
    stdin: empty or closed.
    stdout, stderr: file, terminal, closed, full (a disk without room), or gone (a pipe that nobody reads).
    env: added to the environment.

it answers with the exit `code`, and with what arrived at `stdout`, `stderr` and the `terminal`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile

import launch.doctor
import launch.up
import launch.verify
from anabranch.config.topology import Topology
from launch.main import main
from launch.process_table import ProcessInfo


class ReadyCluster:
    """A cluster that is up at once; then somebody presses Ctrl-C."""

    endpoint = "127.0.0.1:1"
    admin_token_file = "admin.token"
    processes = (ProcessInfo(name="decode-0", role="decode", pid=1, num_threads=1, cores=(), alive=True),)

    def __init__(self, topology: Topology, **_: object) -> None:
        self.topology = topology

    def start(self) -> None: ...

    def stop(self) -> None: ...

    lost = ()

    def wait_for_end(self, **_: object) -> None:
        raise KeyboardInterrupt


def verified(_: object, topology: Topology) -> launch.verify.VerifyReport:
    return launch.verify.VerifyReport(
        model=topology.model, dtype="float32", num_prompts=1, num_tokens=1, transports=(), differences=()
    )


def lead(number: int, kind: str, file: int, terminal: int) -> None:
    """Lead a descriptor of this process to where `kind` says."""
    if kind == "closed":
        os.close(number)
    elif kind == "gone":
        read_end, write_end = os.pipe()
        os.dup2(write_end, number)
        os.close(read_end)
    elif kind in ("full", "empty"):
        os.dup2(os.open("/dev/full" if kind == "full" else os.devnull, os.O_RDWR), number)
    else:
        os.dup2(terminal if kind == "terminal" else file, number)


def drained(terminal: int) -> bytes:
    """What is written to a terminal until the last process that has it open ends."""
    shown = b""
    try:
        while data := os.read(terminal, 65536):
            shown += data
    except OSError:  # nobody has it open any more
        pass
    os.close(terminal)
    return shown


def serve() -> None:
    """Answer until the end of the questions; returns in each fork, to be the command that was asked for."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    while line := questions.readline():
        asked = json.loads(line)
        if "argv" not in asked:
            answers.write(b"{}\n")
            answers.flush()
            continue
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            outside, inside = os.openpty()
            pid = os.fork()
            if pid == 0:
                os.environ.update(asked.get("env", {}))
                sys.argv = ["anabranch", *asked["argv"]]
                kinds = (asked.get("stdin", "empty"), asked.get("stdout", "file"), asked.get("stderr", "file"))
                files = (-1, stdout.fileno(), stderr.fileno())
                # What is closed comes last, lest what is opened get its number.
                for number in sorted(range(3), key=lambda number: kinds[number] == "closed"):
                    lead(number, kinds[number], files[number], inside)
                return
            os.close(inside)
            answer: dict[str, object] = {"terminal": drained(outside).decode()}
            answer["code"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            for name, file in (("stdout", stdout), ("stderr", stderr)):
                file.seek(0)
                answer[name] = file.read().decode()
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
    os._exit(0)


if __name__ == "__main__":
    launch.up.LocalCluster = ReadyCluster  # type: ignore[assignment,misc]
    launch.verify.Verifier.verify = verified  # type: ignore[method-assign,assignment]
    launch.doctor.examine = lambda: [launch.doctor.Finding(name="cores", found="2")]
    gc.freeze()  # a fork that ends need not look through all that was imported
    serve()
    main()
