"""The snippets of `examples/sdk` do what they say, each asked of one cluster from `examples/topologies`."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from anabranch.config.load import load_topology
from anabranch_client import Admin, Client, Sampling
from launch.cluster import LocalCluster
from tests.support.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(240)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
IDLE_TIMEOUT_S = 30.0
Run = Callable[[str], str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    topology = load_topology(EXAMPLES / "topologies" / "prefill_decode.yaml")
    with LocalCluster(replace(topology, grpc="127.0.0.1:0")) as cluster:
        yield cluster


@pytest.fixture
def run(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(name)`: the output of a snippet that is run as a program."""
    monkeypatch.setenv("ANABRANCH_ENDPOINT", cluster.endpoint)
    monkeypatch.setenv("ANABRANCH_ADMIN_TOKEN_FILE", str(cluster.admin_token_file))

    def run(name: str) -> str:
        path = EXAMPLES / "sdk" / f"{name}.py"
        monkeypatch.setattr("sys.argv", [str(path)])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_no_snippet_is_forgotten() -> None:
    names = {file.stem for file in (EXAMPLES / "sdk").glob("*.py")}
    assert names == set(re.findall(r'run\("(\w+)"\)', Path(__file__).read_text()))


def test_stream(run: Run, cluster: LocalCluster) -> None:
    with Client(cluster.endpoint) as client:
        answer = client.complete("The capital of France is", Sampling(max_tokens=24, temperature=0.0))
    text, _, end = run("stream").removesuffix("\n").rpartition("\n")
    assert text == answer.text
    count = answer.usage.num_output_tokens
    assert end == f"{answer.finish_reason} after {count} tokens from ('prefill-0', 'decode-0')"


def test_many(run: Run) -> None:
    lines = run("many").splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"A story about {subject} begins" for subject in ("a river", "a stone", "rain", "an island")
    ]
    assert all(len(line.partition(": ")[2]) > len("''") for line in lines)


def test_chat(run: Run) -> None:
    shown = run("chat")
    assert "> What is the capital of France?\n" in shown and "> And of Italy?\n" in shown
    (first, _), (second, total) = (map(int, pair) for pair in re.findall(r"\((\d+) of (\d+) prompt tokens", shown))
    assert first == 0 and 16 <= second < total


def test_cancel(run: Run, cluster: LocalCluster) -> None:
    assert run("cancel").endswith("\nleft\n")
    with Admin(cluster.endpoint, token_file=cluster.admin_token_file) as admin:
        eventually(lambda: admin.cluster().num_requests == 0, "no request left", IDLE_TIMEOUT_S)


def test_logprobs(run: Run) -> None:
    _, *lines = run("logprobs").splitlines()
    assert len(lines) == 4
    for line in lines:
        chosen, likeliest = re.findall(r"[\d.]+%", line)[:2]
        assert chosen == likeliest, "greedy takes the likeliest"


def test_retry(run: Run, cluster: LocalCluster) -> None:
    with Client(cluster.endpoint) as client:
        answer = client.complete("The capital of France is", Sampling(max_tokens=16))
    assert run("retry") == f"{answer.text}\n"


def test_admin(run: Run) -> None:
    first, *workers = run("admin").splitlines()
    assert first == "0 requests, 0 of them queued"
    assert [line.split(", tp")[0] for line in sorted(workers)] == [
        "decode-0: decode, ready",
        "prefill-0: prefill, ready",
    ]
