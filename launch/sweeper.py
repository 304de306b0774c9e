"""A tiny process that cleans up after a launcher that was killed before it could.

It waits on a pipe whose other end only the launcher holds. A byte means that the launcher has cleaned up by
itself; end-of-file without one means that it was killed. The sweeper then kills every process that carries the
cluster's mark in its environment and removes the given paths. It is started with `python -I -S sweeper.py`
and imports the standard library alone, so it is up in a few milliseconds and small.
"""

import os
import shutil
import signal
import sys
import time

MARK = "ANABRANCH_CLUSTER"
_KILL_TIMEOUT_S = 5.0
_POLL_S = 0.02


def marked_processes(mark: str) -> list[int]:
    """Process ids, this one's excepted, whose environment says `ANABRANCH_CLUSTER=mark`. Linux only."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    try:
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    except OSError:
        return []
    for pid in pids:
        if pid == os.getpid():
            continue
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = file.read()
        except OSError:  # ended meanwhile, or another user's
            continue
        if wanted in environment.split(b"\0"):
            found.append(pid)
    return found


def kill_marked(mark: str, timeout_s: float = _KILL_TIMEOUT_S) -> list[int]:
    """Kill the marked processes and wait until they are gone; returns those that were killed."""
    killed: list[int] = []
    deadline = time.monotonic() + timeout_s
    while True:
        pids = marked_processes(mark)
        if not pids or time.monotonic() > deadline:
            return killed
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            if pid not in killed:
                killed.append(pid)
        time.sleep(_POLL_S)


def main() -> None:
    lifeline, mark, *paths = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if os.read(int(lifeline), 1):
        return
    kill_marked(mark)
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        try:
            os.unlink(path)
        except OSError:  # a folder, or never written
            continue


if __name__ == "__main__":
    main()
