"""`docs/topology.md` says of each option what the class says that declares it."""

from __future__ import annotations

from dataclasses import fields
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from anabranch.config.topology import AttnPoolConfig, FfnPoolConfig, PoolConfig, RestartConfig, Topology, file_key

pytestmark = pytest.mark.unit

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "option-tables"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = spec_from_loader("option_tables", SourceFileLoader("option_tables", str(SCRIPT)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_options_of_today(script: ModuleType) -> None:
    text = script.PAGE.read_text()
    assert text == script.page(text), "run .venv/bin/python scripts/option-tables"


def test_every_key_of_a_file_has_a_row(script: ModuleType) -> None:
    tables = ("topology", "pool", "attn", "ffn", "restart")
    rows = {line.split(" | ")[0] for name in tables for line in script.table(name).splitlines()}
    classes: tuple[type, ...] = (Topology, PoolConfig, AttnPoolConfig, FfnPoolConfig)
    keys = {file_key(field.name) for options in classes for field in fields(options)} - {"pools", "restart"}
    keys |= {f"restart.{field.name}" for field in fields(RestartConfig)}
    assert {f"| `{key}`" for key in keys} <= rows


def test_a_row_shows_default_unit_and_bounds(script: ModuleType) -> None:
    table = script.table("pool")
    assert "| `kv_cache` | `512MiB` | bytes | 1 to 1024TiB | size of the KV pool of each rank. |" in table
    assert "| `max_step_tokens` | 1024 | tokens | at least 1 |" in table
    assert "| `lanes` | 0 |  | 0 to 4 |" in script.table("attn")
    assert "| `capacity` | `0` | bytes | 0 to 1024TiB |" in script.table("ffn")
    assert "kv_cache" not in script.table("attn") + script.table("ffn")
    assert "| `preemption` | `auto` |  | `auto`, `recompute`, `offload` |" in table


def test_a_page_without_markers_is_refused(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="markers"):
        script.page("# no table")
