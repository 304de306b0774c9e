"""What a cluster holds: blocks, leases and requests as it says; descriptors, threads and memory as the kernel says."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from anabranch_client import Admin
from launch.cluster import LocalCluster

SETTLE_TIMEOUT_S = 30.0
POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """Of one process; `encoders` stands for all children of the orchestrator together.

    Attributes:
        rss_bytes: resident memory; pages that children share with their parent count for each.
    """

    num_descriptors: int
    num_threads: int
    rss_bytes: int

    def __add__(self, other: Holdings) -> Holdings:
        return Holdings(
            num_descriptors=self.num_descriptors + other.num_descriptors,
            num_threads=self.num_threads + other.num_threads,
            rss_bytes=self.rss_bytes + other.rss_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class Census:
    """Of a cluster at one moment.

    Attributes:
        holdings: by process.
        free_blocks: by worker, both of the pool and of host memory.
        num_leases, num_requests: of all workers; requests that the orchestrator knows.
        workers: names of those that are registered.
    """

    holdings: dict[str, Holdings]
    free_blocks: dict[str, int]
    num_leases: int
    num_requests: int
    workers: tuple[str, ...]

    def settled(self, before: Census) -> bool:
        """Whether nothing is held that was not held `before`, by those who are still there."""
        return (
            self.num_leases == self.num_requests == 0
            and all(free >= before.free_blocks.get(name, free) for name, free in self.free_blocks.items())
            and all(
                held.num_descriptors <= before.holdings[name].num_descriptors for name, held in self.holdings.items()
            )
        )


def take(cluster: LocalCluster, admin: Admin) -> Census:
    """The census now. Raises ClientError."""
    said = admin.cluster()
    holdings: dict[str, Holdings] = {}
    for process in cluster.processes:
        if not process.alive:
            continue
        holdings[process.name] = _holdings(process.pid)
        children = psutil.Process(process.pid).children(recursive=True)
        if process.name == "orchestrator" and children:
            first, *others = (_holdings(child.pid) for child in children)
            holdings["encoders"] = sum(others, first)
    return Census(
        holdings=holdings,
        free_blocks={worker.name: worker.num_free_blocks + worker.num_free_host_blocks for worker in said.workers},
        num_leases=sum(worker.num_leases for worker in said.workers),
        num_requests=said.num_requests + sum(worker.num_requests for worker in said.workers),
        workers=tuple(worker.name for worker in said.workers),
    )


def settle(cluster: LocalCluster, admin: Admin, before: Census) -> Census:
    """The first census in which everything is back, or the last one where that does not happen in time."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        census = take(cluster, admin)
        if census.settled(before) or time.monotonic() > deadline:
            return census
        time.sleep(POLL_S)


def _holdings(pid: int) -> Holdings:
    process = psutil.Process(pid)
    return Holdings(
        num_descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        num_threads=process.num_threads(),
        rss_bytes=process.memory_info().rss,
    )
