"""`docs/performance.md` shows what `benchmarks/results` holds."""

from __future__ import annotations

import json
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "performance-page"


@pytest.fixture
def script() -> ModuleType:
    spec = spec_from_loader("performance_page", SourceFileLoader("performance_page", str(SCRIPT)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figure(value: float, reference: float | None, target: float | None, met: bool | None) -> dict[str, Any]:
    ratio = None if reference is None else value / reference
    return {"value": value, "unit": "ms", "reference": reference, "ratio": ratio, "target": target, "met": met}


def test_the_page_shows_the_results_of_today(script: ModuleType) -> None:
    text = script.PAGE.read_text()
    assert text == script.page(text), "run scripts/performance-page"


def test_every_figure_is_shown_and_a_missed_one_twice(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {
        "cpu": "Some CPU avx2 avx512f",
        "cores": 2,
        "threads": 1,
        "gpu": "none",
        "system": "Linux 6.1",
        "python": "3.11",
        "torch": "2.13",
    }
    figures = {"slow": figure(3.0, 2.0, 1.25, False), "fast": figure(1.0, 2.0, 1.25, True)}
    document = {"name": "one", "machine": machine, "figures": figures}
    (tmp_path / "2026-01-02-one.json").write_text(json.dumps(document))
    monkeypatch.setattr(script, "RESULTS", tmp_path)

    tables = script.tables()

    assert "### Missed: 1 of 2 targets" in tables
    assert tables.count("| slow |") == 2 and tables.count("| fast |") == 1
    assert "Some CPU (AVX512), 2 cores" in tables
    assert "| one | slow | 3 ms | 2 | 1.5 | ≤ 1.25 |" in tables


@pytest.mark.parametrize(
    ("value", "reference", "target", "met", "shown"),
    [
        (3.0, 2.0, 1.2, True, "≥ 1.2"),
        (2.0, 2.0, 1.2, False, "≥ 1.2"),
        (2.0, 2.0, 1.2, True, "≤ 1.2"),
        (3.0, 2.0, 1.2, False, "≤ 1.2"),
        (2.0, 2.0, 1.0, True, "= 1"),
        (0.95, None, 0.9, True, "≥ 0.9"),
        (0.95, None, None, None, ""),
    ],
)
def test_a_targets_direction_follows_from_whether_it_was_met(
    script: ModuleType, value: float, reference: float | None, target: float | None, met: bool | None, shown: str
) -> None:
    assert script.bound(figure(value, reference, target, met)) == shown


def test_a_page_without_markers_is_refused(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="markers"):
        script.page("no markers")
