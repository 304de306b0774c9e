"""What is shipped: our rooms, and nothing that only a checkout has."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {
    "anabranch",
    "anabranch_client",
    "transport",
    "runtime",
    "prefill",
    "decode",
    "attn_nodes",
    "ffn_nodes",
    "orchestrator",
    "launch",
}
NOT_SHIPPED = {"benchmarks", "tests", "scripts", "docs", "examples"}


def test_the_wheel_holds_the_rooms_alone() -> None:
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = find_packages(str(ROOT), include=find["include"])
    assert {package.partition(".")[0] for package in packages} == SHIPPED


def test_what_is_shipped_imports_nothing_that_is_not() -> None:
    for room in SHIPPED:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                assert not {name.partition(".")[0] for name in names} & NOT_SHIPPED, path
