"""Arguments, error texts and exit codes of the command line, where no cluster is needed."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from anabranch_client import Completion, FfnTimes, KvTransfer, Route, Timings, Usage
from launch.cli import app
from launch.generate import completion_json
from launch.show import breakdown_table
from launch.verify import first_difference
from transport.planes import registry

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def no_cluster_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("ANABRANCH_ENDPOINT", raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def one_line(result: Result) -> str:
    """What was said on stderr, which must be a single line and no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return lines[0]


@pytest.mark.parametrize("command", ["up", "generate", "verify", "doctor", "models"])
def test_help_teaches_with_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert f"anabranch {command}" in result.stdout


def test_generate_without_a_cluster_says_how_to_start_one() -> None:
    result = run("generate", "hello")
    assert result.exit_code == 1
    assert one_line(result) == (
        "error: no cluster is running here; start one with `anabranch up`, or name one with --endpoint HOST:PORT"
    )


def test_generate_at_a_dead_endpoint_says_so() -> None:
    result = run("generate", "hello", "--endpoint", "127.0.0.1:1")
    assert result.exit_code == 1
    assert one_line(result) == (
        "error: no cluster answers at 127.0.0.1:1; start one with `anabranch up`, or mend --endpoint"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either a PROMPT or --prompt-ids"),
        (["hello", "--prompt-ids", "1"], "give either a PROMPT or --prompt-ids"),
        (["--prompt-ids", "1,x"], "--prompt-ids: '1,x': give whole numbers"),
        (["--prompt-ids", "1", "--chat"], "--chat and --system need a text prompt"),
    ],
)
def test_generate_refuses_what_makes_no_prompt(arguments: list[str], said: str) -> None:
    result = run("generate", *arguments)
    assert result.exit_code == 2
    assert said in one_line(result)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modle: x", "modle: 'x': unknown key; did you mean model?"),
        ("pools: {prefill: {workers: 0}, decode: {}}", "pools.prefill.workers: 0: must be at least 1"),
        ("pools: {prefill: {tp: 0}, decode: {}}", "pools.prefill.tp: 0: must be at least 1"),
        ("model: no-such-model", "'no-such-model' is no model known here"),
        ("model: [", "is not valid YAML"),
    ],
)
@pytest.mark.parametrize("command", ["up", "verify"])
def test_a_bad_topology_is_refused_in_one_line(tmp_path: Path, command: str, text: str, said: str) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text(text)
    result = run(command, str(path))
    assert result.exit_code == 2
    assert said in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_up_refuses_a_ready_file_in_no_folder(tmp_path: Path) -> None:
    result = run("up", "--ready-file", str(tmp_path / "absent" / "ready.json"))
    assert result.exit_code == 2
    assert "is no folder; make it first" in one_line(result)


def test_models_lists_the_known_one() -> None:
    result = run("models", "--json")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)
    assert "smollm2-135m" in [row["name"] for row in rows]
    assert set(rows[0]) == {"name", "description", "licence", "origin", "available"}


def test_doctor_names_what_decides() -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert {"cores", "CPU", "memory", "GPUs", "plane ucx", "plane tcp", "compiler", "versions"} <= set(findings)
    assert "torch" in findings["versions"]["found"]


def test_doctor_says_why_a_plane_that_is_installed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = registry.PlaneStatus(
        name="ucx", usable=False, reason="UCX moves nothing", remedy="mount /dev/shm writable", broken=True
    )
    monkeypatch.setattr(registry, "_ucx_status", lambda listen_host: broken)
    findings = {finding["name"]: finding for finding in json.loads(run("doctor", "--json").stdout)}
    assert findings["plane ucx"]["found"] == "UCX moves nothing"
    assert findings["plane ucx"]["remedy"] == "mount /dev/shm writable"
    assert findings["plane tcp"]["used"] == "kv_transport auto between processes"


def test_the_json_of_an_answer() -> None:
    completion = Completion(
        request_id="r",
        text="hi",
        token_ids=(1, 2),
        logprobs=(),
        finish_reason="length",
        usage=Usage(num_prompt_tokens=3, num_output_tokens=2, num_cached_tokens=0),
        route=("prefill-0", "decode-0"),
        timings=Timings(queue_s=0.1, prefill_s=0.2, kv_stream_s=0.3, ttft_s=0.4, tpot_s=0.5, e2e_s=0.6),
        kv=KvTransfer(bytes=7, transport="tcp", overlap=0.9),
        ffn=FfnTimes(queue_s=0.7, compute_s=0.8, way_s=0.9, num_answers=4, num_merged_rows=10),
    )
    assert completion_json(completion) == {
        "request_id": "r",
        "text": "hi",
        "token_ids": [1, 2],
        "finish_reason": "length",
        "usage": {"num_prompt_tokens": 3, "num_output_tokens": 2, "num_cached_tokens": 0},
        "timings": {
            "queue_s": 0.1,
            "prefill_s": 0.2,
            "kv_stream_s": 0.3,
            "ttft_s": 0.4,
            "tpot_s": 0.5,
            "e2e_s": 0.6,
            "recovery_s": 0.0,
        },
        "route": ["prefill-0", "decode-0"],
        "num_recoveries": 0,
        "routes": [],
        "kv": {"bytes": 7, "transport": "tcp", "overlap": 0.9},
        "ffn": {"queue_s": 0.7, "compute_s": 0.8, "way_s": 0.9, "num_answers": 4, "num_merged_rows": 10},
    }
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(breakdown_table(completion))
    assert "FFN workers   700.0 ms queue, 800.0 ms computing, 900.0 ms on the way; 2.5 rows a product" in (
        console.export_text()
    )
    console.print(breakdown_table(dataclasses.replace(completion, ffn=None)))
    assert "FFN" not in console.export_text()


@pytest.mark.parametrize(
    ("want", "got", "index"),
    [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1, 2), (1,), 1), ((1,), (1, 2), 1), ((), (), None)],
)
def test_the_first_difference(want: tuple[int, ...], got: tuple[int, ...], index: int | None) -> None:
    assert first_difference(want, got) == index


def test_a_client_only_install_says_what_to_install() -> None:
    source = "import sys; sys.modules['typer'] = None; sys.argv = ['anabranch']; import launch.main; launch.main.main()"
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1
    assert ran.stderr == "error: typer is not installed; pip install 'anabranch[server]'\n"


def test_the_breakdown_tells_of_recoveries() -> None:
    timings = Timings(queue_s=0.1, prefill_s=0.2, kv_stream_s=0.1, ttft_s=0.3, tpot_s=0.01, e2e_s=2.0, recovery_s=0.25)
    completion = Completion(
        request_id="r",
        text="",
        token_ids=(1, 2, 3),
        logprobs=(),
        finish_reason="length",
        usage=Usage(num_prompt_tokens=3, num_output_tokens=3, num_cached_tokens=0),
        route=("p-1", "d-1"),
        timings=timings,
        kv=None,
        num_recoveries=1,
        routes=(
            Route(workers=("p-0", "d-0"), num_tokens=1, left="worker_died"),
            Route(workers=("p-0", "d-1"), num_tokens=0, left="preempted"),
            Route(workers=("p-1", "d-1"), num_tokens=2, left=""),
        ),
    )
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(breakdown_table(completion))
    shown = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert shown[:3] == [
        "route p-1 -> d-1",
        "before p-0 -> d-0: 1 token, then worker_died",
        "p-0 -> d-1: 0 tokens, then preempted",
    ]
    assert "recoveries 1, 250.0 ms until tokens came again" in shown
    assert [route["left"] for route in completion_json(completion)["routes"]] == ["worker_died", "preempted", ""]
