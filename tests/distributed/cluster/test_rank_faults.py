"""Ranks that are killed or hang under `anabranch up`: their requests go on at other workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from anabranch_client import Admin, Client, Sampling
from tests.support.in_process import wait_until
from tests.support.known import Known
from tests.support.load import Load, Prompt
from tests.support.waiting import WAIT_S

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

READY_TIMEOUT_S = 120.0
COLLECTIVE_TIMEOUT_S = 5.0
TOPOLOGY = """
model: {model}
dtype: float32
native_kernels: false
prefix_cache: false
restart: {{policy: never}}
collective_timeout_s: {timeout_s}
pools:
  prefill: {{workers: 2, cp: 2, threads: 1, kv_cache: 16MiB, max_step_tokens: 64}}
  decode: {{workers: 3, tp: 2, threads: 1, kv_cache: 16MiB}}
"""
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2")
LONG_ANSWER = ([tuple((number * 31 + index) % 97 + 3 for index in range(60)) for number in range(9)], 300)
LONG_PROMPT = ([tuple((number * 31 + index) % 97 + 3 for index in range(1900)) for number in range(8)], 4)


@dataclass(frozen=True)
class Up:
    """`anabranch up`: its process, where it serves, and what it has said so far."""

    process: subprocess.Popen[bytes]
    endpoint: str
    admin_token_file: str
    out: Path
    err: Path

    def said(self) -> str:
        """Standard error in one line."""
        return " ".join(self.err.read_text().split())

    def children(self) -> dict[str, psutil.Process]:
        """What `ps` calls each process below it."""
        return {child.name(): child for child in psutil.Process(self.process.pid).children(recursive=True)}


@pytest.fixture
def up(known: Known, tmp_path: Path) -> Iterator[Up]:
    """A cluster of meshes; ended by Ctrl-C, with nothing left."""
    for name in ("run", "tmp"):
        (tmp_path / name).mkdir()
    topology, ready, out, err = (tmp_path / name for name in ("topology.yaml", "ready.json", "out", "err"))
    topology.write_text(TOPOLOGY.format(model=known.folder, timeout_s=COLLECTIVE_TIMEOUT_S))
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "run"), "TMPDIR": str(tmp_path / "tmp")}
    shm = set(os.listdir("/dev/shm"))
    with out.open("wb") as out_file, err.open("wb") as err_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "up", str(topology), "--ready-file", str(ready)],
            env={**environment, "COLUMNS": "400"},
            stdout=out_file,
            stderr=err_file,
        )
    children: list[psutil.Process] = []
    try:
        wait_until(lambda: ready.exists() or process.poll() is not None, "ready", READY_TIMEOUT_S, err.read_text)
        assert process.poll() is None, err.read_text()
        children = psutil.Process(process.pid).children(recursive=True)
        announced = json.loads(ready.read_text())
        yield Up(process, announced["grpc"], announced["admin_token_file"], out, err)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(READY_TIMEOUT_S)
    assert [child for child in children if child.is_running()] == []
    assert list((tmp_path / "tmp").iterdir()) == []
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []
    assert not [name for name in set(os.listdir("/dev/shm")) - shm if not name.startswith("ucx")]


def busy(admin: Admin, worker: str) -> bool:
    return any(member.name == worker and member.num_requests for member in admin.cluster().workers)


def strike(up: Up, admin: Admin, load: Load, worker: str, number: signal.Signals) -> list[str]:
    """Signal a worker's second rank once it has work; how all requests ended."""

    wait_until(lambda: busy(admin, worker), f"requests at {worker}")
    if worker.startswith("decode"):
        wait_until(lambda: any(load.tokens), "tokens")
    rank = up.children()[f"{worker}.1"]
    os.kill(rank.pid, number)
    wait_until(lambda: f"died: {worker} (pid" in up.said(), f"up to say that {worker} died", WAIT_S, up.said)
    wait_until(lambda: worker not in [member.name for member in admin.cluster().workers], "it to be gone")
    wait_until(lambda: not rank.is_running(), "the rank to be gone")
    how = (
        rf"\(pid {rank.pid}\) was killed by SIGKILL" if number == signal.SIGKILL else r".*collective_timeout_s = 5\.0 s"
    )
    assert re.search(rf"died: {worker} \(pid \d+\) exited with code 1 .*rank 1 of {worker} {how}", up.said()), up.said()
    results = load.results()
    assert not [result for result in results if ": " in result or worker in result.split("+")[1:]], results
    assert max(load.recoveries) > 0
    assert [gone.name for gone in admin.cluster().departures].count(worker) == 1
    return results


def test_ranks_die_and_hang(up: Up, good: dict[Prompt, Prompt]) -> None:
    with Client(up.endpoint, timeout_s=180.0) as client, Admin(up.endpoint, token_file=up.admin_token_file) as admin:

        def check() -> None:
            """What is left serves, and holds nothing of what was."""
            sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
            with ThreadPoolExecutor(len(good)) as threads:
                found = list(threads.map(lambda prompt: client.complete(prompt, sampling).token_ids, good))
            assert found == list(good.values())

            def idle() -> bool:
                return admin.cluster().num_requests == 0 and all(
                    (worker.num_free_blocks, worker.num_leases) == (worker.num_total_blocks, 0)
                    for worker in admin.cluster().workers
                )

            wait_until(idle, "idle")

        assert set(up.children()) >= {*WORKERS, *(f"{worker}.1" for worker in WORKERS), "orchestrator"}

        def listed() -> bool:
            table = " ".join(up.out.read_text().split())
            return all(f"{worker}.1 rank 1" in table for worker in WORKERS)

        wait_until(listed, "the table of processes", describe=up.out.read_text)
        check()
        decoders = {"decode-0", "decode-1", "decode-2"}
        for worker, number in (("decode-0", signal.SIGKILL), ("decode-1", signal.SIGSTOP)):
            results = strike(up, admin, Load(client, *LONG_ANSWER), worker, number)
            decoders.remove(worker)
            assert {result.partition("+")[2] for result in results} == decoders, results
            check()
        results = strike(up, admin, Load(client, *LONG_PROMPT), "prefill-0", signal.SIGKILL)
        assert "prefill-1+decode-2" in results, results
        check()
        # The last of its role: with it goes all that could be served, and `up` says so and ends.
        load = Load(client, LONG_PROMPT[0][:2], 4)
        wait_until(lambda: busy(admin, "prefill-1"), "requests at prefill-1")
        os.kill(up.children()["prefill-1.1"].pid, signal.SIGSTOP)
        results = load.results()
        # They wait for another to come, which nobody starts, and meanwhile `up` ends everything.
        assert all(result.startswith(("no_workers: ", "draining: ", "unavailable: ")) for result in results), results
        wait_until(lambda: up.process.poll() is not None, "up to end", READY_TIMEOUT_S, up.said)
        assert up.process.returncode == 1
        assert "died: prefill-1 (pid" in up.said()
        assert "no prefill worker is left, so nothing can be served" in up.said()
