"""The attack benchmark against a real cluster, small: nothing unnamed, nothing wrong, nothing kept."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from anabranch.system.child_process import python_environment, python_module

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(240)]

TIMEOUT_S = 230.0
# Memory is for long runs to tell.
NOT_HERE = (".rss",)


def test_an_attack_leaves_nothing_and_meets_no_unnamed_error(tmp_path: Path) -> None:
    found = tmp_path / "attack.json"
    arguments = ("--quick", "--inputs", "600", "--seed", "11", "--json", str(found))
    done = subprocess.run(
        python_module("benchmarks.attack", *arguments),
        env=python_environment({}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    figures = json.loads(found.read_text())["figures"]
    missed = {key: figure for key, figure in figures.items() if figure["met"] is False and not key.endswith(NOT_HERE)}
    assert not missed, f"{missed}\n{done.stderr[-2000:]}"
    for key in ("status.INTERNAL", "status.UNKNOWN", "errors.unnamed", "hung", "answers.wrong", "answers.missing"):
        assert figures[key]["value"] == 0, key
    for worker in ("prefill-0", "decode-0", "colocated-0"):
        for kept in ("free_blocks", "descriptors"):
            assert figures[f"after_attacks.{worker}.{kept}"]["met"], (worker, kept)
    # That something was attacked at all, by each road.
    roads = {"calls.OK", "calls.INVALID_ARGUMENT.invalid_request", "control.messages", "slices.sent", "cancels.whole"}
    assert roads <= figures.keys()
    assert figures["answers.right"]["value"] > 50
    assert figures["kills.killed.decode-0"]["value"] == 1
