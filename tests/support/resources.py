"""What a process holds: descriptors, threads, sockets; to be compared before and after."""

from __future__ import annotations

import os
import threading
from collections import Counter
from dataclasses import dataclass

import psutil

# Names of the threads that clusters, engines, planes and connectors run on.
_OURS = ("cluster", "engine", "plane-", "connect", "encode", "rank-", "watchdog")


def num_descriptors() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/fd"))


def our_threads() -> list[str]:
    """Names of this process's threads that belong to a cluster."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith(_OURS))


@dataclass(frozen=True)
class Holdings:
    """Descriptors by what they point to, and the number of threads."""

    descriptors: Counter[str]
    num_threads: int

    def beyond(self, other: Holdings, spare_threads: int = 0) -> str:
        """What is held here and not in `other`, in words; empty when nothing is."""
        more = self.descriptors - other.descriptors
        threads = self.num_threads - other.num_threads - spare_threads
        return ", ".join([f"{count} x {kind}" for kind, count in more.items()] + [f"{threads} threads"] * (threads > 0))


def holdings(pid: int | None = None) -> Holdings:
    """What process `pid` (this one) holds now."""
    pid = pid or os.getpid()
    kinds: Counter[str] = Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
        kinds[target.partition("[")[0] if ":[" in target else target] += 1
    return Holdings(kinds, psutil.Process(pid).num_threads())
