"""A real cluster on this machine: ready, used, hurt, stopped, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from anabranch.config.topology import PoolConfig, Pools, Topology
from anabranch.errors import WorkerDied
from anabranch.protocol.workers import Role
from anabranch_client import Admin, Client, Sampling, Tokens
from launch import sweeper
from launch.cluster import LocalCluster
from launch.process import ProcessExit
from launch.process_table import missing_role
from tests.support.waiting import WAIT_S, eventually

pytestmark = pytest.mark.distributed

READY_TIMEOUT_S = 120.0
COLOCATED = Topology(pools=Pools(colocated=PoolConfig(kv_cache_bytes=32 << 20, threads=1)))


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def shm_entries() -> set[str]:
    return set(os.listdir("/dev/shm"))


def of_clusters() -> list[str]:
    """Names of this process's threads without those that it has one of, and keeps."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name not in ("clock", "fork-server"))


def test_a_cluster_serves_and_leaves_nothing() -> None:
    shm = shm_entries()
    threads = of_clusters()
    with LocalCluster(COLOCATED, ready_timeout_s=READY_TIMEOUT_S) as cluster:
        folder = cluster.folder
        assert folder.stat().st_mode & 0o777 == 0o700
        processes = cluster.processes
        assert [(p.name, p.role, p.alive) for p in processes] == [
            ("orchestrator", "orchestrator", True),
            ("colocated-0", "colocated", True),
        ]
        with Client(cluster.endpoint) as client:
            answer = client.complete("The capital of France is", Sampling(max_tokens=4))
            assert answer.route == ("colocated-0",)
            assert len(answer.token_ids) == 4
        assert "registered" in cluster.log("colocated-0")
        assert cluster.deaths == ()
    assert all(gone(process.pid) for process in processes)
    assert not folder.exists()
    assert sweeper.marked_processes(str(folder)) == []
    assert shm_entries() <= shm
    eventually(lambda: of_clusters() == threads)


def test_prefill_and_decode_share_a_process_in_process() -> None:
    pools = Pools(
        prefill=PoolConfig(kv_cache_bytes=32 << 20, threads=1), decode=PoolConfig(kv_cache_bytes=32 << 20, threads=1)
    )
    with LocalCluster(Topology(kv_transport="inproc", pools=pools), ready_timeout_s=READY_TIMEOUT_S) as cluster:
        assert [(p.name, p.role) for p in cluster.processes] == [
            ("orchestrator", "orchestrator"),
            ("inproc", "prefill+decode"),
        ]
        with Client(cluster.endpoint) as client:
            answer = client.complete("The capital of France is", Sampling(max_tokens=4))
        assert answer.route == ("prefill-0", "decode-0")
        assert answer.kv is not None
        assert answer.kv.transport == "inproc"


def test_a_killed_worker_is_named_and_comes_back_while_its_requests_go_on_and_a_drained_one_stays_away() -> None:
    deaths: list[ProcessExit] = []
    pools = Pools(colocated=PoolConfig(workers=2, kv_cache_bytes=64 << 20, threads=1))
    with (
        LocalCluster(Topology(pools=pools), ready_timeout_s=READY_TIMEOUT_S, on_death=deaths.append) as cluster,
        Client(cluster.endpoint) as client,
        Admin(cluster.endpoint, token_file=cluster.admin_token_file) as admin,
    ):
        sampling = Sampling(max_tokens=200, ignore_eos=True)
        stream = client.generate("Once upon a time", sampling)
        begun = next(event for event in stream if isinstance(event, Tokens))
        holder = next(worker for worker in admin.cluster().workers if worker.num_requests)
        os.kill(holder.pid, signal.SIGKILL)
        death = cluster.wait_for_death(WAIT_S)
        assert death is not None
        assert death.name == holder.name
        assert death.reason == "was killed by SIGKILL"
        *rest, finished = stream
        assert (finished.num_recoveries, finished.routes[0].workers) == (1, (holder.name,))
        assert finished.route != (holder.name,)
        found = [token for event in (begun, *rest) for token in event.token_ids]
        assert tuple(found) == client.complete("Once upon a time", sampling).token_ids
        eventually(lambda: deaths == [death])
        departures = admin.cluster().departures
        assert [(gone.name, gone.expected) for gone in departures] == [(holder.name, False)]

        def back() -> bool:
            pids = {worker.name: worker.pid for worker in admin.cluster().workers}
            return pids.get(holder.name, holder.pid) != holder.pid

        eventually(back, within_s=READY_TIMEOUT_S)
        assert cluster.process(holder.name).alive
        (other,) = {worker.name for worker in admin.cluster().workers} - {holder.name}
        admin.drain(other)
        assert cluster.wait_for_end(after=1).left
        again = client.complete("Once upon a time", sampling)
        assert (again.route, again.token_ids) == ((holder.name,), tuple(found))
        assert cluster.deaths == (death,)
        assert {process.name: process.alive for process in cluster.processes} == {
            "orchestrator": True,
            holder.name: True,
        }
        assert cluster.lost == ()


def test_a_start_that_fails_says_why_and_leaves_nothing() -> None:
    cluster = LocalCluster(
        Topology(pools=Pools(colocated=PoolConfig(kv_cache_bytes=1000))), ready_timeout_s=READY_TIMEOUT_S
    )
    with pytest.raises(WorkerDied, match=r"^colocated-0: kv_cache_bytes: 1000: must hold one block") as caught:
        cluster.start()
    assert "\n" not in str(caught.value)
    assert not cluster.folder.exists()
    assert sweeper.marked_processes(str(cluster.folder)) == []


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which everything that `up` writes lies under `tmp_path`."""
    for name in ("run", "tmp"):
        (tmp_path / name).mkdir()
    return {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "run"), "TMPDIR": str(tmp_path / "tmp")}


@pytest.fixture
def up(tmp_path: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with running_up(tmp_path, environment) as process:
        yield process


@contextmanager
def running_up(tmp_path: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """`anabranch up`, ready to serve, in a folder whose files have our modules' names."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("anabranch", "decode", "orchestrator", "prefill", "runtime", "transport", "launch", "json", "torch"):
        (folder / f"{name}.py").write_text("raise SystemExit('a file of the current folder was run')\n")
    topology = tmp_path / "topology.yaml"
    topology.write_text("colocated: {kv_cache: 32MiB, threads: 1}\nrestart: {max_per_10min: 1}\n")
    process = subprocess.Popen(
        [Path(sys.executable).with_name("anabranch"), "up", topology, "--ready-file", tmp_path / "ready.json"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        ready = tmp_path / "ready.json"
        eventually(lambda: ready.exists() or process.poll() is not None, within_s=READY_TIMEOUT_S)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        if process.stderr is not None and not process.stderr.closed:
            process.communicate(timeout=WAIT_S)


def children_of(up: subprocess.Popen[str]) -> list[int]:
    return [child.pid for child in psutil.Process(up.pid).children(recursive=True)]


def test_up_generate_and_ctrl_c(tmp_path: Path, environment: dict[str, str], up: subprocess.Popen[str]) -> None:
    ready = json.loads((tmp_path / "ready.json").read_text())
    assert ready["grpc"].startswith("127.0.0.1:")
    children = children_of(up)
    assert {process["pid"] for process in ready["processes"]} <= set(children)

    def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launch.cli", "generate", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )

    answer = generate("--prompt-ids", "504,3575,282", "--max-tokens", "5", "--ignore-eos", "--json")
    assert answer.returncode == 0, answer.stderr
    parsed = json.loads(answer.stdout)
    assert len(parsed["token_ids"]) == 5
    assert parsed["finish_reason"] == "length"
    assert parsed["usage"]["num_prompt_tokens"] == 3
    assert parsed["route"] == ["colocated-0"]
    assert parsed["kv"] is None
    assert set(parsed["timings"]) == {
        *("queue_s", "prefill_s", "kv_stream_s", "ttft_s", "tpot_s", "e2e_s"),
        "recovery_s",
    }

    streamed = generate("The capital of France is", "--max-tokens", "5")
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout.startswith(" Paris")
    assert "first token" in streamed.stderr

    refused = generate("--prompt-ids", "-1")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1

    up.send_signal(signal.SIGINT)
    out, err = up.communicate(timeout=WAIT_S)
    assert up.returncode == 0, err
    assert "colocated-0" in out
    assert ready["grpc"] in out
    assert all(gone(pid) for pid in children)
    assert not (tmp_path / "ready.json").exists()
    assert list((tmp_path / "tmp").iterdir()) == []
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


def test_a_killed_launcher_leaves_nothing(tmp_path: Path, up: subprocess.Popen[str]) -> None:
    children = children_of(up)
    assert len(children) >= 3
    up.kill()
    up.wait(WAIT_S)
    eventually(lambda: all(gone(pid) for pid in children))
    assert not (tmp_path / "ready.json").exists()
    assert list((tmp_path / "tmp").iterdir()) == []
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


def test_up_says_what_died_and_what_comes_of_it(tmp_path: Path, environment: dict[str, str]) -> None:
    with running_up(tmp_path, environment) as up, up.stderr as said:  # type: ignore[union-attr]
        ready = json.loads((tmp_path / "ready.json").read_text())
        worker = next(process for process in ready["processes"] if process["name"] == "colocated-0")
        os.kill(worker["pid"], signal.SIGKILL)
        lines = iter(said.readline, "")
        assert f"died: colocated-0 (pid {worker['pid']}) was killed by SIGKILL\n" in lines
        assert "colocated-0 is started again in 0.5 s\n" in lines
        assert "colocated-0 is back\n" in lines
        with Admin(ready["grpc"], token_file=ready["admin_token_file"]) as admin, Client(ready["grpc"]) as client:
            (again,) = admin.cluster().workers
            assert len(client.complete("The capital of France is", Sampling(max_tokens=4)).token_ids) == 4
        # That was its only start in ten minutes, and with its only worker gone there is nothing that `up` could do.
        os.kill(again.pid, signal.SIGKILL)
        rest = " ".join(said.read().split())
        assert up.wait(WAIT_S) == 1
    assert f"died: colocated-0 (pid {again.pid}) was killed by SIGKILL" in rest
    assert "no colocated worker is left, so nothing can be served" in rest
    assert "the others go on" not in rest


def test_the_demo_answers_and_leaves_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    demo = subprocess.run(
        [sys.executable, "-m", "launch.demo"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=READY_TIMEOUT_S + WAIT_S,
        check=False,
    )
    assert demo.returncode == 0, demo.stderr
    assert "Paris" in demo.stdout
    assert "prefill-0 -> decode-0" in demo.stdout
    assert "KV stream" in demo.stdout
    assert "0 processes and 0 folders left behind" in demo.stdout
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("living", "missing"),
    [
        ({"prefill", "attn", "ffn"}, ""),
        ({"prefill", "attn", "ffn", "decode"}, ""),
        ({"prefill", "decode"}, ""),
        ({"prefill", "attn"}, "decode"),
        ({"attn", "ffn", "decode"}, "prefill"),
        (set(), "prefill"),
    ],
)
def test_a_role_that_nobody_has_any_more(living: set[Role], missing: str) -> None:
    assert missing_role({"prefill", "decode", "attn", "ffn"}, living) == missing
