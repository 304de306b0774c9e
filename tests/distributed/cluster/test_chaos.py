"""Workers are killed and stopped under streams of all kinds: nobody notices, and nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TIMEOUT_S = 400.0


def test_streams_do_not_notice_faults(tmp_path: Path) -> None:
    out = tmp_path / "chaos.json"
    command = [sys.executable, "-m", "benchmarks.chaos", "--quick", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = {key: figure["value"] for key, figure in json.loads(out.read_text())["figures"].items()}
    for key in ("answers.wrong", "errors", "deaths.unasked", "left"):
        assert figures[f"tcp.{key}"] == 0, f"{key}\n{done.stdout}"
    assert figures["tcp.recoveries"] > 0
    assert figures["tcp.faults"] == 10
