"""`python -m tests.support.child_report [exit N | threads | raise | wait | die]`: says what it is, and does as told."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
from pathlib import Path


def compute_threads() -> list[int]:
    """OpenMP threads that a product gets on the main thread and on another, once this process has set 3."""
    import torch

    torch.set_num_threads(3)
    found = [torch.get_num_threads()]
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found


def descriptors() -> list[str]:
    return sorted(os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists() and int(link.name) > 2)


if __name__ == "__main__":
    report = {
        "name": Path("/proc/self/comm").read_text().strip(),
        "arguments": sys.argv[1:],
        "module": __name__,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "seen": os.fsdecode(Path("/proc/self/environ").read_bytes()).strip("\0").split("\0"),
        "command": os.fsdecode(Path("/proc/self/cmdline").read_bytes()).strip("\0").split("\0"),
        "pid": os.getpid(),
        "session": os.getsid(0),
        "parent": os.getppid(),
        "cores": sorted(os.sched_getaffinity(0)),
        "stdin": sys.stdin.read(),
        "temporary": tempfile.gettempdir(),
        "random": random.random(),
        "threads": compute_threads() if "threads" in sys.argv else [],
        "descriptors": descriptors(),
        "modules": "runtime.generation.worker" in sys.modules,
        "handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        "cuda": "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized(),
    }
    print(json.dumps(report), flush=True)
    match sys.argv[1:]:
        case ["exit", code]:
            sys.exit(int(code))
        case ["raise"]:
            raise ValueError("as told")
        case ["die"]:
            os.kill(os.getpid(), signal.SIGABRT)
        case ["wait"]:
            signal.pause()
