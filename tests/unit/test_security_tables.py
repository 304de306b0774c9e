"""docs/security.md says what the code says."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    loader = SourceFileLoader("security_tables", str(ROOT / "scripts" / "security-tables"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_says(tables: ModuleType) -> None:
    page = tables.PAGE.read_text()
    assert tables.renewed(page) == page, "run scripts/security-tables"
    assert tables.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("| orchestrator | `max_queued` | 256 |", "| orchestrator | `max_queued` | 257 |"),
        ("| `anabranch.v1.Admin` | `Drain` |", "| `anabranch.v1.Admin` | `Stop` |"),
        ("| worker | `step_stall_s` | 120 s |", ""),
    ],
)
def test_a_page_that_differs_is_found(tables: ModuleType, tmp_path: Path, monkeypatch, capsys, was, now) -> None:
    page = tables.PAGE.read_text()
    assert was in page
    stale = tmp_path / "security.md"
    stale.write_text(page.replace(was, now))
    monkeypatch.setattr(tables, "PAGE", stale)
    assert tables.main(["--check"]) == 1
    assert "run scripts/security-tables" in capsys.readouterr().out
    assert tables.main([]) == 0
    assert stale.read_text() == page


def test_every_socket_of_the_page_is_explained(tables: ModuleType) -> None:
    page = tables.PAGE.read_text()
    for (kind, address), (what, proof) in tables.SOCKETS.items():
        assert f"| {kind} | `{address}` | {what} | {proof} |" in page
    assert "NOT EXPLAINED" not in page
