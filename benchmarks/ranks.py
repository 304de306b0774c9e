"""Ranks of a benchmark as processes of one thread each, pinned to cores, joined by shared memory.

A benchmark module defines `rank_main(group, task)`, which returns figures; `run_ranks` starts
`python -m benchmarks.ranks MODULE RANK SIZE FOLDER` for each rank and gathers what they return as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import torch

from anabranch.system.child_process import python_environment, python_module
from transport.collectives.shm import ShmGroup, join

Value: TypeAlias = "str | int | float | bool | Sequence[Value] | Mapping[str, Value]"
Task: TypeAlias = Mapping[str, Value]
Figures: TypeAlias = dict[str, float]


class RankMain(Protocol):
    def __call__(self, group: ShmGroup, task: Task) -> Figures: ...


def run_ranks(module: str, size: int, task: Task, *, timeout_s: float = 240.0) -> list[Figures]:
    """Run `module`'s `rank_main` on `size` ranks and give their figures in rank order.

    Raises:
        RuntimeError: a rank failed or was not done within `timeout_s`; what it said is on stderr.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "task.json").write_text(json.dumps(task))
        environment = python_environment({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
        ranks = [
            subprocess.Popen(
                python_module("benchmarks.ranks", module, str(rank), str(size), name),
                env=environment,
                stdout=subprocess.DEVNULL,
            )
            for rank in range(size)
        ]
        end = time.monotonic() + timeout_s
        try:
            codes = [rank.wait(max(0.0, end - time.monotonic())) for rank in ranks]
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{module}: ranks were not done within {timeout_s} s") from None
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if any(codes):
            raise RuntimeError(f"{module}: ranks ended with {codes}")
        return [json.loads((folder / f"figures-{rank}.json").read_text()) for rank in range(size)]


def main() -> int:
    """One rank."""
    module, rank, size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    rank_main: RankMain = importlib.import_module(module).rank_main
    task = json.loads((folder / "task.json").read_text())
    group = join(rank=rank, size=size, rendezvous=folder, start_timeout_s=120.0)
    try:
        figures = rank_main(group, task)
    finally:
        group.close()
    (folder / f"figures-{rank}.json").write_text(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
